"""Messages over a torch.distributed process group (gloo, NCCL, any backend with send and receive).

Does: translate group ranks to global ranks, post one batched send and receive per hop, and turn a
lost or late peer into a RingError that names it. Does not: create or destroy groups; timeouts are
the group's own. Tested with gloo; other backends are untested.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from nxd_cp.schedule import Move
from nxd_cp.transport.base import Transport
from nxd_cp.transport.errors import RingError

# How many contexts each group has had. Ranks make them in the same order; the number goes into the
# header of every message, so that two contexts used in another order on two ranks never mix.
_CONTEXTS: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
_CONTEXTS_LOCK = threading.Lock()


# What every backend can add up; other dtypes are gathered and added here.
_REDUCED = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
)


@dataclass
class Ticket:
    """A hop that was posted."""

    works: list[dist.Work]
    move: Move
    buffers: tuple[Tensor, ...]  # owned until both ends are done


class DistributedTransport(Transport):
    """This process's end of the ring over `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        with _CONTEXTS_LOCK:
            self.context = _CONTEXTS[group] = _CONTEXTS.get(group, 0) + 1
        self._group = group
        self.device = message_device(group)
        self.global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]

    def post(self, out: Tensor | None, into: Tensor | None, move: Move, channel: str) -> Ticket:
        ends = ((dist.isend, out, move.to), (dist.irecv, into, move.source))
        pair = [
            dist.P2POp(act, x, self.global_ranks[peer], self._group, _tag(channel, x))
            for act, x, peer in ends
            if x is not None and peer is not None
        ]
        buffers = tuple(op.tensor for op in pair)
        self.verifies_at_once = buffers[0].device.type == "cpu"
        try:
            works = dist.batch_isend_irecv(pair)
        except RuntimeError as error:
            self._raise(move, error)
        return Ticket(works, move, buffers)

    def complete(self, ticket: Ticket) -> None:
        for work in ticket.works:
            try:
                work.wait()
            except RuntimeError as error:
                self._raise(ticket.move, error)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        content = tensor.contiguous().view(-1).view(torch.uint8)  # every backend knows bytes
        found = [torch.empty_like(content) for _ in range(self.size)]
        with self._all_take_part("all_gather"):
            dist.all_gather(found, content, group=self._group)
        return [one.view(tensor.dtype).view(tensor.shape) for one in found]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _REDUCED:
            return super().all_reduce_sum(tensor)
        total = tensor.clone(memory_format=torch.contiguous_format)
        with self._all_take_part("all_reduce"):
            dist.all_reduce(total, group=self._group)
        return total

    @contextmanager
    def _all_take_part(self, collective: str) -> Iterator[None]:
        """A lost or late rank makes this end unusable, as in a hop."""
        self.check_usable()
        try:
            yield
        except RuntimeError as error:
            reason = (
                f"rank {self.rank} lost the others in {collective}: a rank is gone, late, or in "
                f"another call: {error}"
            )
            self.fail(reason)
            raise RingError(reason) from error

    def _raise(self, move: Move, error: RuntimeError) -> NoReturn:
        raise RingError(
            f"rank {self.rank} lost its neighbours (sends to rank {move.to}, receives from rank "
            f"{move.source}): a rank is gone, late, or in another call: {error}"
        ) from error


def message_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where messages lie whatever a caller's tensors do: gloo and MPI take the CPU's, other
    backends an accelerator's. None is the default group.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return accelerator


def _tag(channel: str, x: Tensor) -> int:
    """gloo ends the process when a message is longer than the buffer that waits for it, so the tag
    carries the length: ranks that disagree end in a timeout, and that is an error.
    """
    return 1 + zlib.crc32(f"{channel} {x.numel()}".encode()) % 0x7FFF
