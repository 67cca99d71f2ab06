"""A rectangle as the kernels see it: one key/value head at a time, cut into launches that fit.

Does: bring tensors into the kernels' shapes and back, and join what several launches computed. Does
not: launch (`neuron.py`), or decide where to cut (`kernel_blocks.py`).

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, E head dim of v; P (batch,
key/value head) pairs and N query heads of each, as the kernels see them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.backends import kernel_limits as limits
from nxd_cp.backends.base import Scores
from nxd_cp.backends.kernel_blocks import Block, split
from nxd_cp.backends.kernel_masks import Bounds, kernel_masks

Rows = tuple[Tensor, Tensor, Tensor]  # o, lse and statistics, as the kernels see them
Found = dict[tuple[int, int, int], tuple[Block, Rows]]  # by corner: the latest block and its rows
Launches = list[tuple[Block, tuple[Tensor, ...]]]


class Cut:
    """A rectangle of q [B, H, S, D], k [B, G, K, D] and v [B, G, K, E], and its launches.

    shares: how many pairs a key/value head is repeated as, so that two cores have an even number.
    loops: whether device loops run blocks under an interval mask.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        *,
        shares: int,
        cores: int,
        loops: bool = False,
    ) -> None:
        self.masks, self.shares, self.cores = kernel_masks(scores.mask, q, k), shares, cores
        self.num_pairs = q.shape[0] * k.shape[1] * shares
        self.launch = limits.Launch(
            heads=q.shape[1] // k.shape[1] // shares,
            rows=q.shape[2],
            keys=k.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            itemsize=q.element_size(),
            mask=self.masks[0].word,
            softcap=scores.softcap is not None,
            loops=loops and self.masks[0].word == "interval",
        )

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, S, ...] as [P, N, S, ...]; a key/value head's query heads lie together."""
        return x.reshape(self.num_pairs, self.launch.heads, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        """[B, G, K, ...] as [P, 1, K, ...]."""
        return x.flatten(0, 1).repeat_interleave(self.shares, dim=0).unsqueeze(1)

    def shared(self, x: Tensor) -> Tensor:
        """As `keys`, a new tensor whose shares of a head add up to it."""
        return self.keys(x) / self.shares

    def sum_keys(self, x: Tensor, like: Tensor) -> Tensor:
        """[P, 1, K, ...] back as [B, G, K, ...], summed over the shares of a head."""
        shares = x.reshape(*like.shape[:2], self.shares, *like.shape[2:])
        return shares[:, :, 0] if self.shares == 1 else shares.sum(2)

    def launches(self) -> Launches:
        """Blocks and the `bounds` of each, without those in which nothing is visible."""
        blocks = split(self.launch, self.num_pairs, self.cores)
        return [
            (block, self._bounds(mask.bounds, block))
            for mask in self.masks
            for block in blocks
            if mask.bounds is None or not mask.bounds.is_empty(block, self.num_pairs)
        ]

    def has_all_rows(self, block: Block) -> bool:
        """Whether a block has every query row: its results are those of the rectangle."""
        sizes = tuple(part.stop - part.start for part in block.queries)
        return sizes == (self.num_pairs, self.launch.heads, self.launch.rows)

    def is_whole(self, launches: Launches) -> bool:
        """Whether one launch is the rectangle: nothing is cut, and nothing has to be joined."""
        if len(launches) != 1:
            return False
        block, _ = launches[0]
        return self.has_all_rows(block) and block.keys == slice(0, self.launch.keys)

    def join(self, found: Found, before: Rows) -> Rows:
        """The results of all rows: those found, and what the others had before."""
        if len(found) == 1:
            ((block, rows),) = found.values()
            if self.has_all_rows(block):
                return rows
        o, lse, statistics = (x.clone() for x in before)
        for block, rows in found.values():
            o[block.queries], lse[block.queries], statistics[block.queries] = rows
        return o, lse, statistics

    def _bounds(self, bounds: Bounds | None, block: Block) -> tuple[Tensor, ...]:
        return () if bounds is None else bounds.within(block, self.num_pairs)


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As the kernels read them; those that lie in one piece are not copied."""
    return tuple(x.contiguous() for x in tensors)


def no_rows(q_P: Tensor, value_dim: int, empty_lse: float) -> Rows:
    """What rows of q_P have that saw nothing, [P, N, S, E, 1 or 2], without memory of their own."""
    rows = q_P.shape[:-1]
    zero = q_P.new_zeros((), dtype=torch.float32)
    lse = zero + empty_lse
    statistics = torch.stack((lse, zero + 1.0))
    return zero.expand(*rows, value_dim), lse.expand(*rows, 1), statistics.expand(*rows, 2)
