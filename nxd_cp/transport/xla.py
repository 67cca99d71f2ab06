"""Hops as collective permutes, for torch-neuronx 2.9 on XLA. Untested on a device.

Does: emit one `collective_permute` per hop as the hop starts, with the pairs of every group of the
world, so that all processes trace the same collectives. Causal and full rings only: there every
hop goes to the next rank. Does not: verify headers or agree on arguments, which would need values
while a graph is traced; the shapes in the graph are the agreement.
Source: torch_xla `xm.collective_permute(value, pairs)`, torch_xla/core/xla_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nxd_cp.schedule import Move, Plan
from nxd_cp.transport.base import Transport
from nxd_cp.transport.call import Call, Hop
from nxd_cp.transport.parcel import Parcel

Permute = Callable[[Tensor, list[list[int]]], Tensor]


class XlaTransport(Transport):
    """One process's end. groups: global ranks of every context-parallel group of the world, each in
    ring order, of equal lengths; one of them holds `global_rank`.
    """

    can_agree = False
    verifies_at_once = False

    def __init__(
        self, groups: Sequence[Sequence[int]], global_rank: int, permute: Permute | None = None
    ) -> None:
        mine = [tuple(group) for group in groups if global_rank in group]
        everyone = sorted(rank for group in groups for rank in group)
        if len(mine) != 1 or everyone != list(range(len(everyone))):
            raise ValueError(
                f"groups: expected every global rank from 0 on once, rank {global_rank} among "
                f"them, got {[list(group) for group in groups]}"
            )
        if len({len(group) for group in groups}) != 1:
            raise ValueError(f"groups: expected equal sizes, got {[len(g) for g in groups]}")
        super().__init__(mine[0].index(global_rank), len(mine[0]))
        self.global_ranks = list(mine[0])
        self._permute = _collective_permute() if permute is None else permute
        self.pairs = [
            [group[place - 1], rank] for group in groups for place, rank in enumerate(group)
        ]

    def call(self, kind: str) -> Call:
        """As `Transport.call`; the hops are permutes."""
        self.num_calls += 1
        return _XlaCall(self, kind, self.num_calls)

    def validate(self, plan: Plan, *, packed: bool) -> None:
        """As `Transport.validate`: causal and full rings in which every hop goes to the next."""
        following = (self.rank + 1) % self.size
        moves = [move for step in plan.steps[self.rank] for move in (step.kv, step.grad) if move]
        full_turn = plan.gradient_route == "travel" and plan.num_steps == self.size
        if packed or not full_turn or any(move.to != following for move in moves):
            raise ValueError(
                "XLA: expected a causal or full ring in group order in which every block makes the "
                'full turn, got another; use strategy="ring", no window or documents, and with a '
                'causal mask layout="zigzag" or "striped"'
            )

    def post(self, out: Tensor | None, into: Tensor | None, move: Move, channel: str) -> Tensor:
        """Emit the permute of what is in `out`; `into` is not used."""
        assert out is not None, "every rank sends in every hop of a causal or full ring"
        return self._permute(out, self.pairs)

    def complete(self, ticket: Any) -> None:
        """Nothing to wait for: the graph orders the permute."""


class _XlaParcel(Parcel):
    """One tensor; a permute returns a new one."""

    def __init__(self, channel: str, content: Tensor, owner: int) -> None:
        self.channel, self.owner, self.dtype = channel, owner, content.dtype
        self.shape, self.size_bytes = tuple(content.shape), content.nbytes
        self.content = content

    @property
    def payload(self) -> Tensor:
        """What is here now."""
        return self.content

    def release(self) -> None:
        """The graph owns its memory."""


class _XlaHop(Hop):
    def wait(self) -> Tensor:
        """What came in; no value is looked at."""
        assert isinstance(self.into, _XlaParcel), "parcels of this call are its own"
        if self._move is not None:
            self.into.content, self.into.owner = self.ticket, self._move.brings
        return self.into.payload


class _XlaCall(Call):
    def parcel(
        self, channel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Parcel:
        """A parcel without header, of zeros."""
        content = torch.zeros(shape, dtype=dtype, device=device)
        self._parcels.append(_XlaParcel(channel, content, owner=self.transport.rank))
        return self._parcels[-1]

    def start(self, parcel: Parcel, move: Move | None, into: Parcel | None = None) -> Hop:
        """Emit the permute now, before what is computed meanwhile."""
        hop = _XlaHop(self, parcel, move, parcel if into is None else into)
        counters = self.transport.counters
        if move is not None:
            hop.ticket = self.transport.post(parcel.payload, None, move, parcel.channel)
            counters.messages[parcel.channel] += 1
            counters.size_bytes[parcel.channel] += parcel.size_bytes
        return hop


def _collective_permute() -> Permute:
    try:
        import torch_xla.core.xla_model as xm
    except ImportError as error:
        raise ValueError(
            "XLA: expected torch_xla (with torch-neuronx 2.9), which cannot be imported here; "
            "use CPContext.from_group"
        ) from error
    return xm.collective_permute
