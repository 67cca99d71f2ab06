"""Calls, parcels and hops: what every transport does in the same way.

Does: own the buffers, number the messages, check what arrives, count what is sent, and refuse hops
that nobody waits for. Does not: move a byte itself (`distributed.py`, `local.py`).

    with transport.call("forward") as call:
        hop = call.start(parcel, move)   # what is in the parcel leaves
        ...                              # compute on parcel.payload, which may be read, not written
        payload = hop.wait()             # what came in is in the parcel now

Note [Two buffers]
    A parcel owns two buffers. One holds what is here and is sent, the other receives; `wait`
    returns when both ends are done and swaps them. So a buffer in flight is never written, and the
    one that was sent is never read again (in debug mode it is filled with NaN).

Note [Headers]
    Each message carries its call number, its place in the call, its channel and its sender. Two
    rings that overlap in a different order on two ranks therefore raise and do not mix their data.
    Headers are verified where that costs no device synchronisation, that is on the CPU.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nxd_cp.debugging import debug_enabled
from nxd_cp.schedule import HEADER_BYTES, Move

_MAGIC = 0x4E58444350  # "NXDCP"
CHANNELS = ("kv", "grad", "agreement", "gather")
RING_CHANNELS = ("kv", "grad")


class RingError(RuntimeError):
    """A ring could not be completed: a rank is lost, late, or runs something else."""


class RankMismatchError(ValueError):
    """The ranks of a group called the same operation with different arguments."""


@dataclass
class Counters:
    """Messages and bytes that this rank has sent, by channel; headers are included."""

    messages: Counter[str] = field(default_factory=Counter)
    size_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def ring_messages(self) -> int:
        """Messages of keys, values and their gradients: what `Plan.traffic` counts."""
        return sum(self.messages[channel] for channel in RING_CHANNELS)

    @property
    def ring_bytes(self) -> int:
        """Bytes of keys, values and their gradients: what `Plan.traffic` counts."""
        return sum(self.size_bytes[channel] for channel in RING_CHANNELS)

    def reset(self) -> None:
        """Start again from zero."""
        self.messages.clear()
        self.size_bytes.clear()


class Parcel:
    """A tensor that travels, in two owned buffers; see Note [Two buffers]."""

    def __init__(
        self,
        channel: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        owner: int,
    ) -> None:
        assert channel in CHANNELS, f"expected one of {CHANNELS}, got {channel!r}"
        self.channel = channel
        self.owner = owner  # group rank whose data this is; travels with the data
        self.shape, self.dtype = shape, dtype
        payload_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.size_bytes = HEADER_BYTES + payload_bytes
        self._here = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._spare: Tensor | None = None  # a ring of one never needs it

    @property
    def payload(self) -> Tensor:
        """What is here now."""
        return self._here[HEADER_BYTES:].view(self.dtype).view(self.shape)

    def spare(self) -> Tensor:
        """The buffer that receives."""
        if self._spare is None:
            self._spare = torch.empty_like(self._here)
        return self._spare

    def swap(self) -> None:
        """What came in becomes what is here."""
        here, self._here = self._here, self.spare()
        self._spare = here
        if debug_enabled():
            self._spare.fill_(0xFF)  # NaN in every floating dtype

    def write_header(self, values: list[int]) -> None:
        header = self._here[:HEADER_BYTES].view(torch.int64)
        header.copy_(torch.tensor(values, dtype=torch.int64))

    def read_header(self) -> list[int]:
        return self.spare()[:HEADER_BYTES].view(torch.int64).tolist()


class Hop:
    """One exchange under way. Every hop must be waited for, once."""

    def __init__(self, call: Call, parcel: Parcel, move: Move | None) -> None:
        self._call, self._parcel, self._move = call, parcel, move
        self.sequence = 0
        self.ticket: Any = None

    def wait(self) -> Tensor:
        """Block until both ends are done; return what is in the parcel now."""
        if self._move is not None:
            self._call._finish(self, self._parcel, self._move)
        return self._parcel.payload


class Call:
    """One numbered ring call: the hops of a forward or of a backward."""

    def __init__(self, transport: Transport, kind: str, number: int) -> None:
        self.transport, self.kind, self.number = transport, kind, number
        self._num_started = 0
        self._open: set[Hop] = set()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            if self._open:
                self.transport.fail(f"{self} stopped in mid-ring: {error}")
            return
        if self._open:
            which = ", ".join(
                str(hop.sequence) for hop in sorted(self._open, key=lambda h: h.sequence)
            )
            self.transport.fail(f"{self} ended with hops that nobody waited for: {which}")
            raise RingError(
                f"{self}: hop {which} was started but never waited for; call hop.wait()"
            )

    def start(self, parcel: Parcel, move: Move | None) -> Hop:
        """Send what is in the parcel and receive into its other buffer; None moves nothing."""
        hop = Hop(self, parcel, move)
        if move is None:
            return hop
        transport = self.transport
        transport.check_usable()
        self._num_started += 1
        hop.sequence = self._num_started
        parcel.write_header(self._header(hop, parcel, transport.rank) + [parcel.owner, 0])
        self._open.add(hop)
        hop.ticket = transport.post(parcel._here, parcel.spare(), move, parcel.channel)
        transport.counters.messages[parcel.channel] += 1
        transport.counters.size_bytes[parcel.channel] += parcel.size_bytes
        return hop

    def _finish(self, hop: Hop, parcel: Parcel, move: Move) -> None:
        if hop not in self._open:
            raise RingError(f"{self}: hop {hop.sequence} is not under way; wait for a hop once")
        try:
            self.transport.complete(hop.ticket)
        except RingError as error:
            self.transport.fail(str(error))
            raise RingError(
                f"{self}, message {hop.sequence} ({parcel.channel}): {error}"
            ) from error
        self._open.discard(hop)
        header = parcel.read_header() if self.transport.reads_headers else None
        if header is not None:
            expected = self._header(hop, parcel, move.source)
            if header[:-2] != expected:
                message = (
                    f"rank {self.transport.rank} expected {_describe(expected)}, got "
                    f"{_describe(header)}; the ranks run their rings in a different order"
                )
                self.transport.fail(message)
                raise RingError(message)
            parcel.owner = header[-2]
        parcel.swap()

    def _header(self, hop: Hop, parcel: Parcel, sender: int) -> list[int]:
        channel = CHANNELS.index(parcel.channel)
        return [_MAGIC, self.number, hop.sequence, channel, sender, parcel.size_bytes]

    def __str__(self) -> str:
        return f"ring call {self.number} ({self.kind}) on rank {self.transport.rank}"


class Transport(ABC):
    """One rank's end of a ring. Not shared between ranks; calls are numbered in order."""

    reads_headers = True

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.counters = Counters()
        self.num_calls = 0
        self._lock = threading.Lock()
        self._failure: str | None = None

    def call(self, kind: str) -> Call:
        """Open the next numbered call. Raises RingError when an earlier one broke the group."""
        self.check_usable()
        with self._lock:
            self.num_calls += 1
            return Call(self, kind, self.num_calls)

    def fail(self, reason: str) -> None:
        """Mark this end as unusable: messages may be left in flight. The first reason stays."""
        if self._failure is None:
            self._failure = reason

    def check_usable(self) -> None:
        """Raise RingError when an earlier call was left half done."""
        if self._failure is not None:
            raise RingError(
                f"rank {self.rank}: this group cannot be used any more ({self._failure}); "
                "make a new process group and context"
            )

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; equal shapes and dtypes."""
        here = Parcel("gather", tuple(tensor.shape), tensor.dtype, tensor.device, self.rank)
        here.payload.copy_(tensor)
        found = {self.rank: here.payload.clone()}
        move = Move(to=(self.rank + 1) % self.size, source=(self.rank - 1) % self.size)
        with self.call("all_gather") as call:
            for _ in range(self.size - 1):
                payload = call.start(here, move).wait()
                found[here.owner] = payload.clone()
        return [found[rank] for rank in range(self.size)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, added in rank order; the argument is left as it is."""
        total, *others = self.all_gather(tensor)
        for other in others:
            total += other
        return total

    @abstractmethod
    def post(self, out: Tensor, into: Tensor, move: Move, channel: str) -> Any:
        """Begin to send `out` and to receive into `into`; return what `complete` needs."""

    @abstractmethod
    def complete(self, ticket: Any) -> None:
        """Block until both are done. Raises RingError when a rank is lost or late."""


def _describe(header: list[int]) -> str:
    magic, number, sequence, channel, sender, size_bytes, *_ = header
    if magic != _MAGIC:
        return "a message that is not ours"
    return (
        f"message {sequence} ({CHANNELS[channel]}, {size_bytes} bytes) "
        f"of ring call {number} from rank {sender}"
    )
