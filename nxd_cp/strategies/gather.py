"""Rounds of heads; and the "gather" strategy, where every message of a round is under way early.

Does: give each round's buffers back as it ends; for "gather", post the keys and values of one round
to all ranks that see them while the round before is computed, and hand them to the ring's own loop
as it asks for them. Does not: choose tiles or routes (`plan.py`).
Memory: "ring": two blocks of one round's heads. "gather": two rounds of every rank that we see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nxd_cp.blocks import KeyBlock
from nxd_cp.schedule import Move, Plan
from nxd_cp.strategies.plan import StrategyPlan
from nxd_cp.transport import Call, Hop, Parcel


class RoundCall(Call):
    """One round of heads within a call: its buffers are given back when the round is done."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.transport, call.kind, call.number)
        self._call = call

    def parcel(
        self, channel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Parcel:
        """See `Call.parcel`."""
        self._parcels.append(self._call.parcel(channel, shape, dtype, device))
        return self._parcels[-1]

    def start(self, parcel: Parcel, move: Move | None, into: Parcel | None = None) -> Hop:
        """See `Call.start`."""
        return self._call.start(parcel, move, into)

    def count_hop(self, channel: str) -> int:
        """See `Call.count_hop`."""
        return self._call.count_hop(channel)

    def release(self, parcels: list[Parcel]) -> None:
        """See `Call.release`."""
        for parcel in list(parcels):
            self._parcels.remove(parcel)
            self._call.release([parcel])

    def end(self) -> None:
        """The round is done: its buffers serve a later one."""
        self.release(self._parcels)


class PostedCall(RoundCall):
    """A round whose hops of keys and values are under way already; others it starts as asked."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._hops: list[Hop] = []

    def post(self, plan: Plan, rank: int, k: Tensor, v: Tensor) -> None:
        """Start all hops of keys and values."""
        block = KeyBlock(self, k, v)
        for step in plan.steps[rank]:
            if step.kv is None:
                super().count_hop("kv")
            else:
                self._hops.append(block.post(step.kv))

    def posted_hop(self) -> Hop | None:
        """See `Call.posted_hop`."""
        return self._hops.pop(0)

    def count_hop(self, channel: str) -> int:
        """See `Call.count_hop`; those of keys and values were counted when they were posted."""
        return 0 if channel == "kv" else super().count_hop(channel)


def rounds_of(
    call: Call, work: StrategyPlan, rank: int, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, slice, RoundCall]]:
    """For each round: its query heads, its key/value heads, and the call to run the ring with."""
    group_size = q.shape[1] // k.shape[1]

    def begin(heads: slice) -> RoundCall:
        if work.strategy.name != "gather":
            return RoundCall(call)
        posted = PostedCall(call)
        posted.post(work.plan, rank, k[:, heads], v[:, heads])
        return posted

    following = begin(work.rounds[0])
    for index, heads in enumerate(work.rounds):
        one = following
        for next_heads in work.rounds[index + 1 : index + 2]:
            following = begin(next_heads)
        yield slice(heads.start * group_size, heads.stop * group_size), heads, one
        one.end()
