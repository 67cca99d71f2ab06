"""How the gradients of keys and values come home to the rank that owns them.

Does: add the parts of each step and move them, by one of the two routes of a `Plan`: they travel
with their keys and make the full turn, or each part goes straight to its owner. Does not: compute a
part (`ring.py`). All is fp32, added in the order of the steps, so results repeat bit by bit.

Letters: B batch, Hkv key/value heads, S local rows, D head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nxd_cp.schedule import Plan, Step
from nxd_cp.transport import Call

Part = tuple[slice, list[Tensor]]  # key rows, [dk, dv] of these rows


class Gradients(Protocol):
    """The gradients of one backward."""

    def add(self, step: Step, parts: list[Part]) -> None:
        """Add what `step` computed for the rank whose keys are here, and begin to move it."""

    def finish(self) -> Tensor:
        """[2, B, Hkv, S, D]: those of our own keys and values. Copy before the call ends."""
        ...


def collect(call: Call, plan: Plan, like: Tensor) -> Gradients:
    """The plan's route. like: our keys."""
    return Travelling(call, like) if plan.gradient_route == "travel" else Direct(call, like)


class Travelling:
    """One sum per owner, which follows its keys round the ring."""

    def __init__(self, call: Call, like: Tensor) -> None:
        self._call = call
        self._parcel = call.parcel("grad", (2, *like.shape), torch.float32, like.device)
        self._hop = call.start(self._parcel, None)

    def add(self, step: Step, parts: list[Part]) -> None:
        """See `Gradients.add`."""
        _add_parts(self._hop.wait(), parts, first=step.index == 0)
        self._hop = self._call.start(self._parcel, step.grad)

    def finish(self) -> Tensor:
        """See `Gradients.finish`; the header of the last message says that these are ours."""
        return self._hop.wait()


class Direct:
    """Our own sum stays here; what we compute for others leaves at the end of each step."""

    def __init__(self, call: Call, like: Tensor) -> None:
        self._call = call
        self._total = torch.empty((2, *like.shape), dtype=torch.float32, device=like.device)
        self._parcel = call.parcel("grad", (2, *like.shape), torch.float32, like.device)
        self._hop, self._comes_in = call.start(self._parcel, None), False

    def add(self, step: Step, parts: list[Part]) -> None:
        """See `Gradients.add`."""
        self._receive()
        if step.index == 0:
            _add_parts(self._total, parts, first=True)
        elif parts:
            _add_parts(self._parcel.payload, parts, first=True)
            self._parcel.owner = step.owner
        self._hop = self._call.start(self._parcel, step.grad)
        self._comes_in = step.grad is not None and step.grad.source is not None

    def finish(self) -> Tensor:
        """See `Gradients.finish`."""
        self._receive()
        return self._total

    def _receive(self) -> None:
        payload = self._hop.wait()
        if self._comes_in:
            self._total += payload


def _add_parts(grads: Tensor, parts: list[Part], *, first: bool) -> None:
    """Add parts to gradients [2, B, Hkv, S, D]; `first` overwrites."""
    if first and len(parts) == 1 and parts[0][1][0].shape == grads.shape[1:]:
        torch.stack(parts[0][1], out=grads)
        return
    if first:
        grads.zero_()
    for rows, dkv in parts:
        for total, part in zip(grads, dkv, strict=True):
            total[:, :, rows] += part
