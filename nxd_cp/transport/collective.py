"""Hops without send and receive: each is one all_to_all, which every rank of the group joins.

Does: carry a hop by all_to_all_single with uneven splits, so that nothing but the messages travels.
Does not: choose itself (`probe.py`).

Ranks start their hops in the same order, so their collectives match; a rank with nothing to send
or receive in a hop takes part with empty buffers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nxd_cp.schedule import Move
from nxd_cp.transport.distributed import DistributedTransport, Ticket


class CollectiveTransport(DistributedTransport):
    """This process's end of a ring whose hops are collectives over `group`."""

    joins_every_hop = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._device = self.device  # of empty buffers: where the last message lay

    def post(self, out: Tensor | None, into: Tensor | None, move: Move, channel: str) -> Ticket:
        """As `Transport.post`; both may be None."""
        sends, receives = ([0] * self.size for _ in range(2))
        if out is not None and move.to is not None:
            sends[move.to] = out.numel()
        if into is not None and move.source is not None:
            receives[move.source] = into.numel()
        given = [x for x in (out, into) if x is not None]
        if given:
            self._device = given[0].device
            self.verifies_at_once = self._device.type == "cpu"
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        out, into = (nothing if x is None else x for x in (out, into))
        try:
            work = dist.all_to_all_single(
                into, out, receives, sends, group=self._group, async_op=True
            )
        except RuntimeError as error:
            self._raise(move, error)
        return Ticket([work], move, (out, into))
