"""Masks as the NKI kernels take them: a compile-time word, or bounds that are data.

Does: turn windows and documents into the first and stop key of every query and the first and stop
query of every key, and cut these to a block. Does not: apply a mask.

Letters: B batch; P (batch, key/value head) pairs; S query rows, K keys.
Note [Documents that come back]
    The kernels read intervals, and a document is one interval where its tokens follow each other.
    Ids that come back after another document have several runs. Then every pair of a query run and
    a key run is a mask of its own, in which each document has one run at most; together they show
    every visible pair once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.backends.intervals import visible_keys, visible_queries
from nxd_cp.backends.kernel_blocks import Block


@dataclass(frozen=True)
class Bounds:
    """Visible intervals: keys of every query [B or 1, S], queries of every key [B or 1, K]."""

    first_key: Tensor
    stop_key: Tensor
    first_query: Tensor
    stop_query: Tensor

    def within(self, block: Block, num_pairs: int) -> tuple[Tensor, ...]:
        """The four bounds in a block's own coordinates, fp32 [pairs, length, 1] each."""
        cut = (
            (self.first_key, block.rows, block.keys),
            (self.stop_key, block.rows, block.keys),
            (self.first_query, block.keys, block.rows),
            (self.stop_query, block.keys, block.rows),
        )
        return tuple(
            _of_pairs(bound, num_pairs)[block.groups, own]
            .sub(other.start)
            .clamp(0, other.stop - other.start)
            .float()
            .unsqueeze(-1)
            .contiguous()
            for bound, own, other in cut
        )

    def is_empty(self, block: Block, num_pairs: int) -> bool:
        """Whether nothing is visible in a block; never for bounds that are not on the CPU."""
        if self.first_key.device.type != "cpu":
            return False
        first, stop, _, _ = self.within(block, num_pairs)
        return not bool((first < stop).any())


@dataclass(frozen=True)
class KernelMask:
    """What a kernel is told: its word, and bounds where the word is "interval"."""

    word: str
    bounds: Bounds | None = None


def kernel_masks(mask: BlockMask, q: Tensor, k: Tensor) -> list[KernelMask]:
    """The mask of a rectangle of q [B, H, S, D] and k [B, G, K, D], as disjoint parts."""
    if isinstance(mask, str):
        return [KernelMask(mask)]
    sizes = q.shape[2], k.shape[2], q.device
    parts = _one_run_each(mask) if isinstance(mask, Documents) else [mask]
    return [
        KernelMask("interval", Bounds(*visible_keys(m, *sizes), *visible_queries(m, *sizes)))
        for m in parts
    ]


def _one_run_each(mask: Documents) -> list[Documents]:
    """See Note [Documents that come back]; one part where none does."""
    q_run, k_run = _run_numbers(mask.q_ids), _run_numbers(mask.k_ids)
    least = min(int(mask.q_ids.min()), int(mask.k_ids.min()))
    return [
        Documents(
            mask.mask,
            mask.q_ids.masked_fill(q_run != a, least - 1),
            mask.k_ids.masked_fill(k_run != b, least - 2),
        )
        for a in range(int(q_run.max()) + 1)
        for b in range(int(k_run.max()) + 1)
    ]


def _run_numbers(ids: Tensor) -> Tensor:
    """[B, S]: how many earlier runs of its own id each token's run has."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    numbers = torch.zeros_like(ids)
    for row, (own, begins) in enumerate(zip(ids, starts, strict=True)):
        runs = own[begins]
        earlier = (runs[:, None] == runs[None, :]).tril(-1).sum(1)
        numbers[row] = earlier[begins.cumsum(0) - 1]
    return numbers


def _of_pairs(bound: Tensor, num_pairs: int) -> Tensor:
    """[1 or B, S] as [pairs, S]: the pairs of a batch element lie together."""
    return bound.repeat_interleave(num_pairs // bound.shape[0], dim=0)
