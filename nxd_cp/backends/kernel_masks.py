"""Masks as the NKI kernels take them: a compile-time word, or bounds that are data.

Does: turn windows into the first and stop key of every query and the first and stop query of every
key, and cut these to a block. Does not: apply a mask.

Letters: P (batch, key/value head) pairs, or 1 where all are equal; S query rows, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.backends.kernel_blocks import Block
from nxd_cp.schedule import Bounded


@dataclass(frozen=True)
class Bounds:
    """Visible intervals: keys of every query [P, S] and queries of every key [P, K], fp32."""

    first_key: Tensor
    stop_key: Tensor
    first_query: Tensor
    stop_query: Tensor

    def within(self, block: Block, num_pairs: int) -> tuple[Tensor, ...]:
        """The four bounds in a block's own coordinates, [pairs, length, 1] each."""
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


def kernel_mask(mask: BlockMask, q: Tensor, k: Tensor) -> KernelMask:
    """The mask of a rectangle of q [B, H, S, D] and k [B, G, K, D]."""
    num_rows, num_keys = q.shape[2], k.shape[2]
    if isinstance(mask, str):
        return KernelMask(mask)
    if isinstance(mask, Documents):
        raise ValueError(
            'documents: expected a mask without documents for the kernels; use backend="torch"'
        )
    keys = _band(mask, num_rows, num_keys)
    queries = _band(Bounded(-mask.high, -mask.low), num_keys, num_rows)
    return KernelMask("interval", Bounds(*keys, *queries))


def _band(mask: Bounded, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """First and stop column of every row, [1, rows] fp32; equal where a row sees nothing."""
    row = torch.arange(num_rows)
    first = (row + mask.low).clamp(0, num_columns)
    stop = (row + mask.high + 1).clamp(0, num_columns)
    return first.float().unsqueeze(0), torch.maximum(first, stop).float().unsqueeze(0)


def _of_pairs(bound: Tensor, num_pairs: int) -> Tensor:
    """[1 or B, S] as [pairs, S]: the pairs of a batch element lie together."""
    return bound.repeat_interleave(num_pairs // bound.shape[0], dim=0)
