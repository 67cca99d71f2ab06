"""A numbered ring call and its hops.

Does: number the messages, check what arrives, and refuse hops that nobody waits for. Does not: move
a byte itself (`distributed.py`, `local.py`).

    with transport.call("forward") as call:
        parcel = call.parcel("kv", shape, dtype, device)
        hop = call.start(parcel, move)   # what is in the parcel leaves
        ...                              # compute on parcel.payload, which may be read, not written
        payload = hop.wait()             # what came in is in the parcel now

Note [Headers]
    Each message carries its context and call number, its place in the call, its channel, its
    sender, whose data it is, and the place of its call among all calls that started. Two rings that
    overlap in a different order on two ranks therefore raise and do not mix their data, also where
    their lengths keep them apart; and gradients that come home are known to be ours. On an
    accelerator, where a look at the header would stall it, headers are verified as the call ends.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nxd_cp.debugging import debug_enabled
from nxd_cp.schedule import Move
from nxd_cp.transport.errors import RingError
from nxd_cp.transport.parcel import CHANNELS, Parcel

if TYPE_CHECKING:
    from nxd_cp.transport.base import Transport

_MAGIC = 0x4E58444350  # "NXDCP"
_NO_MOVE = Move(None, None, brings=-1)  # of a rank that joins a collective without a message
_CONTEXT_SHIFT = 32  # the context's number lies above the call's


class Hop:
    """One exchange under way. Every hop must be waited for, once."""

    def __init__(self, call: Call, parcel: Parcel, move: Move | None, into: Parcel) -> None:
        self._call, self.parcel, self._move, self.into = call, parcel, move, into
        self.sequence = 0
        self.ticket: Any = None
        self.sent: Tensor | None = None  # in debug mode a copy of what is in flight

    def wait(self) -> Tensor:
        """Block until both ends are done; return what is in the receiving parcel now."""
        if self._move is not None:
            self._call.finish(self, self.parcel, self._move, self.into)
        return self.into.payload


class Call:
    """One numbered ring call: the hops of a forward or of a backward."""

    def __init__(self, transport: Transport, kind: str, number: int) -> None:
        self.transport, self.kind, self.number = transport, kind, number
        self._num_started = 0
        self._place = 0  # among the calls of this transport, in the order in which they started
        self._open: list[Hop] = []
        self._joined: list[Any] = []  # tickets of collectives that carry nothing of ours
        self._has_begun = False
        self._parcels: list[Parcel] = []
        self._unverified: list[tuple[Tensor, list[int]]] = []

    def __enter__(self) -> Call:
        self.transport.enter_call()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self._end(error)
        finally:
            self.transport.leave_call()

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            # A lost rank may show already when a hop is posted, before it is open.
            if self._open or self._has_begun or isinstance(error, RingError):
                self.transport.fail(f"{self} stopped in mid-ring: {error}")
            return
        for ticket in self._joined:
            self._complete(ticket, "a hop that carries nothing of this rank")
        for header, expected in self._unverified:
            self._verify(header.tolist(), expected)
        if self._open:
            which = ", ".join(str(hop.sequence) for hop in self._open)
            raise self._failed(f"{self}: nobody waited for hop {which}; call hop.wait()")
        self.release(self._parcels)

    def begin(self) -> None:
        """From here on the others count on this rank, also where no hop of ours is under way: an
        error leaves them in mid-ring. Hops begin a call, except those of the agreement.
        """
        self._has_begun = self.transport.size > 1

    def release(self, parcels: list[Parcel]) -> None:
        """Give the buffers of these parcels back before the call ends; nothing is in flight."""
        for parcel in list(parcels):
            self._parcels.remove(parcel)
            parcel.release()

    def parcel(
        self, channel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Parcel:
        """A parcel of this rank's own data, to be filled; its memory is gone as the call ends."""
        rank, pool = self.transport.rank, self.transport.buffers
        self._parcels.append(Parcel(pool, channel, shape, dtype, device, owner=rank))
        return self._parcels[-1]

    def start(self, parcel: Parcel, move: Move | None, into: Parcel | None = None) -> Hop:
        """Send what is in the parcel and receive into its other buffer; None moves nothing.

        into: a parcel of its own for what comes in, where that has another size.
        """
        into = parcel if into is None else into
        hop, transport = Hop(self, parcel, move, into), self.transport
        if move is None:
            hop.sequence = self.count_hop(parcel.channel)
            return hop
        hop.sequence = self._next_hop(parcel.channel)
        transport.check_usable()
        leaves = arrives = None
        if move.to is not None:
            leaves = parcel.outgoing(self._header(hop, parcel, transport.rank, parcel.owner))
            transport.counters.messages[parcel.channel] += 1
            transport.counters.size_bytes[parcel.channel] += parcel.size_bytes
        if move.source is not None:
            arrives = into.spare()
        if debug_enabled() and leaves is not None:
            hop.sent = leaves.clone()
        self._open.append(hop)
        hop.ticket = transport.post(leaves, arrives, move, parcel.channel)
        return hop

    def posted_hop(self) -> Hop | None:
        """The next hop of keys and values where all were started in advance, else None."""
        return None

    def count_hop(self, channel: str) -> int:
        """The number of the next hop, in which nothing moves here: it is the same on all ranks."""
        transport = self.transport
        if transport.joins_every_hop and transport.size > 1:
            self._joined.append(transport.post(None, None, _NO_MOVE, channel))
        return self._next_hop(channel)

    def _next_hop(self, channel: str) -> int:
        if channel != "agreement":
            self.begin()
        self._place = self._place or self.transport.next_place()
        self._num_started += 1
        return self._num_started

    def finish(self, hop: Hop, parcel: Parcel, move: Move, into: Parcel) -> None:
        """What `hop.wait` does when something moves."""
        if hop not in self._open:
            raise RingError(f"{self}: hop {hop.sequence} is not under way; wait for a hop once")
        self._complete(hop.ticket, f"message {hop.sequence} ({parcel.channel})")
        self._open.remove(hop)
        if hop.sent is not None and not torch.equal(hop.sent, parcel.here()):
            raise self._failed(
                f"{self}: the buffer of message {hop.sequence} ({parcel.channel} of rank "
                f"{parcel.owner}) was written while it was in flight; write after hop.wait()"
            )
        if move.source is None:
            return
        expected = self._header(hop, into, move.source, move.brings)
        if self.transport.verifies_at_once:
            self._verify(into.header_received().tolist(), expected)
        else:
            self._unverified.append((into.header_received().clone(), expected))
        into.owner = move.brings
        into.swap()
        if debug_enabled() and into.channel == "grad" and into.has_nan():
            raise self._failed(
                f"{self}: message {hop.sequence} from rank {move.source} holds NaN "
                f"({into.channel} of rank {into.owner})"
            )

    def _complete(self, ticket: Any, what: str) -> None:
        """Block until both ends are done; a lost rank makes this end unusable."""
        try:
            self.transport.complete(ticket)
        except RingError as error:
            raise self._failed(f"{self}, {what}: {error}") from error

    def _header(self, hop: Hop, parcel: Parcel, sender: int, owner: int) -> list[int]:
        channel = CHANNELS.index(parcel.channel)
        size = parcel.size_bytes
        number = self.transport.context << _CONTEXT_SHIFT | self.number
        return [_MAGIC, number, hop.sequence, channel, sender, owner, size, self._place]

    def _verify(self, header: list[int], expected: list[int]) -> None:
        if header != expected:
            raise self._failed(
                f"rank {self.transport.rank} expected {_describe(expected)}, got "
                f"{_describe(header)}; the ranks run their rings in a different order"
            )

    def _failed(self, message: str) -> RingError:
        self.transport.fail(message)
        return RingError(message)

    def __str__(self) -> str:
        return f"ring call {self.number} ({self.kind}) on rank {self.transport.rank}"


def _describe(header: list[int]) -> str:
    magic, number, sequence, channel, sender, owner, size_bytes, place = header
    if magic != _MAGIC:
        return "a message that is not ours"
    return (
        f"message {sequence} of ring call {number % (1 << _CONTEXT_SHIFT)} "
        f"of context {number >> _CONTEXT_SHIFT} from rank {sender} "
        f"({CHANNELS[channel]} of rank {owner}, {size_bytes} bytes; call {place} to start)"
    )
