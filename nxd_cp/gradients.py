"""How the gradients of keys and values come home to the rank that owns them.

Does: add the parts of each step and move them, by one of the two routes of a `Plan`: they travel
with their keys and make the full turn, or each part goes straight to its owner, and of its rows
only those that the rank computed. Does not: compute a part (`ring.py`). All is fp32, added in the
order of the steps, so results repeat bit by bit.

Letters: B batch, Hkv key/value heads, S local rows, D and Dv head dims of keys and values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nxd_cp.blocks import PairShape, place
from nxd_cp.schedule import Move, Plan, Rows, Step, num_rows
from nxd_cp.transport import Call, Hop, Parcel

Pair = tuple[Tensor, Tensor]
Part = tuple[slice, Pair]  # key rows, and dk and dv of these rows


class Gradients(Protocol):
    """The gradients of one backward."""

    def add(self, step: Step, parts: list[Part]) -> None:
        """Add what `step` computed for the rank whose keys are here, and begin to move it."""

    def finish(self) -> Pair:
        """dk [B, Hkv, S, D] and dv [B, Hkv, S, Dv] of our own. Copy before the call ends."""
        ...


def collect(call: Call, plan: Plan, k: Tensor, v: Tensor) -> Gradients:
    """The plan's route for our own keys and values."""
    route = Travelling if plan.gradient_route == "travel" else Direct
    return route(call, k, v)


class Travelling:
    """One sum per owner, which follows its keys round the ring."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self._call, self._shape, self._num_rows = call, PairShape.of(k, v), k.shape[2]
        self._parcel = self._shape.parcel(call, "grad", self._num_rows, k.device, torch.float32)
        self._hop = call.start(self._parcel, None)

    def add(self, step: Step, parts: list[Part]) -> None:
        """See `Gradients.add`."""
        totals = self._shape.split(self._hop.wait(), self._num_rows)
        _add_parts(totals, parts, (slice(0, self._num_rows),), first=step.index == 0)
        self._hop = self._call.start(self._parcel, step.grad)

    def finish(self) -> Pair:
        """See `Gradients.finish`; the header of the last message says that these are ours."""
        return self._shape.split(self._hop.wait(), self._num_rows)


class Direct:
    """Our own sum stays here; what we compute for others leaves at the end of each step."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self._call, self._shape, self._device = call, PairShape.of(k, v), k.device
        self._totals = tuple(x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
        self._transit: tuple[Hop, Move, Parcel | None, Parcel | None] | None = None

    def add(self, step: Step, parts: list[Part]) -> None:
        """See `Gradients.add`."""
        self._receive()
        if step.index == 0:
            _add_parts(self._totals, parts, (slice(0, self._totals[0].shape[2]),), first=True)
        if step.grad is None:
            self._call.count_hop("grad")
        else:
            self._start(step, step.grad, parts)

    def finish(self) -> Pair:
        """See `Gradients.finish`."""
        self._receive()
        dk, dv = self._totals
        return dk, dv

    def _start(self, step: Step, move: Move, parts: list[Part]) -> None:
        out = into = None
        if move.to is not None:
            out = self._parcel(move.out)
            _add_parts(self._split(out.payload, move.out), parts, move.out, first=True)
            out.owner = step.owner
        if move.source is not None:
            into = self._parcel(move.into)
        sender = into if out is None else out
        assert sender is not None, "a move sends or receives"
        self._transit = (self._call.start(sender, move, into), move, out, into)

    def _receive(self) -> None:
        if self._transit is None:
            return
        (hop, move, *parcels), self._transit = self._transit, None
        payload = hop.wait()
        if move.source is not None:
            for total, came in zip(self._totals, self._split(payload, move.into), strict=True):
                first = 0
                for rows in move.into:
                    count = rows.stop - rows.start
                    total[:, :, rows] += came[:, :, first : first + count]
                    first += count
        self._call.release([parcel for parcel in parcels if parcel is not None])

    def _parcel(self, rows: Rows) -> Parcel:
        return self._shape.parcel(self._call, "grad", num_rows(rows), self._device, torch.float32)

    def _split(self, payload: Tensor, rows: Rows) -> Pair:
        return self._shape.split(payload, num_rows(rows))


def _add_parts(totals: tuple[Tensor, ...], parts: list[Part], held: Rows, *, first: bool) -> None:
    """Add parts to gradients of the rows `held`; `first` overwrites."""
    covers = len(parts) == 1 and parts[0][1][0].shape[2] == totals[0].shape[2]
    for index, total in enumerate(totals):
        if first and covers:
            total.copy_(parts[0][1][index])
            continue
        if first:
            total.zero_()
        for rows, pair in parts:
            start = place(held, rows)
            total[:, :, start : start + rows.stop - rows.start] += pair[index]
