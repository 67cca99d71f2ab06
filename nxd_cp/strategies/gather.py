"""The "gather" strategy: every message of a round of heads under way before it is needed.

Does: post the keys and values of one round to all ranks that see them while the round before is
computed, and hand them to the ring's own loop as it asks for them. Does not: choose tiles or routes
(`plan.py`).
Memory: two rounds of keys and values of every rank that we see, besides our own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nxd_cp.blocks import PairShape
from nxd_cp.schedule import Move, Plan
from nxd_cp.strategies.plan import StrategyPlan
from nxd_cp.transport import Call, Hop, Parcel


class PostedCall(Call):
    """A call whose hops of keys and values are under way already; all others it starts as asked."""

    def __init__(self, call: Call, posted: list[tuple[Parcel, Hop]]) -> None:
        super().__init__(call.transport, call.kind, call.number)
        self._call = call
        self._hops = iter([hop for _, hop in posted])
        self._parcels = [parcel for parcel, _ in posted]

    def parcel(
        self, channel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Parcel:
        """See `Call.parcel`."""
        self._parcels.append(self._call.parcel(channel, shape, dtype, device))
        return self._parcels[-1]

    def start(self, parcel: Parcel, move: Move | None, into: Parcel | None = None) -> Hop:
        """See `Call.start`."""
        return self._call.start(parcel, move, into)

    def posted_hop(self) -> Hop | None:
        """See `Call.posted_hop`."""
        return next(self._hops)

    def count_hop(self, channel: str) -> int:
        """See `Call.count_hop`; those of keys and values were counted when they were posted."""
        return 0 if channel == "kv" else self._call.count_hop(channel)

    def release(self, parcels: list[Parcel]) -> None:
        """Buffers serve until the round is done."""

    def end(self) -> None:
        """The round is done: its buffers serve a later one."""
        self._call.release(self._parcels)


def rounds_of(
    call: Call, work: StrategyPlan, rank: int, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[slice, slice, PostedCall]]:
    """For each round: its query heads, its key/value heads, and the call to run the ring with."""
    group_size = q.shape[1] // k.shape[1]
    posted = _post(call, work.plan, rank, k[:, work.rounds[0]], v[:, work.rounds[0]])
    for index, heads in enumerate(work.rounds):
        following = work.rounds[index + 1 : index + 2]
        ready = posted
        if following:
            posted = _post(call, work.plan, rank, k[:, following[0]], v[:, following[0]])
        q_heads = slice(heads.start * group_size, heads.stop * group_size)
        one = PostedCall(call, ready)
        yield q_heads, heads, one
        one.end()


def _post(call: Call, plan: Plan, rank: int, k: Tensor, v: Tensor) -> list[tuple[Parcel, Hop]]:
    posted, shape = [], PairShape.of(k, v)
    for step in plan.steps[rank]:
        if step.kv is None:
            call.count_hop("kv")
            continue
        parcel = shape.parcel(call, "kv", k.shape[2], k.device, k.dtype)
        if step.kv.to is not None:
            for target, x in zip(shape.split(parcel.payload, k.shape[2]), (k, v), strict=True):
                target.copy_(x)
        posted.append((parcel, call.start(parcel, step.kv)))
    return posted
