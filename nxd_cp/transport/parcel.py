"""What travels, and how much of it.

Does: own the buffers of a message, write and read its header, count what is sent. Does not: send.

Note [Two buffers]
    A parcel owns two buffers. One holds what is here and is sent, the other receives; when a hop is
    done they are swapped. So a buffer in flight is never written, and the one that was sent is
    never read again (in debug mode it is filled with NaN).

Note [The pool]
    Fresh memory is slow to touch for the first time, so large buffers go back to a small pool when
    a call has ended well. A context holds at most `POOL_BUFFERS` of them between calls.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nxd_cp.debugging import debug_enabled
from nxd_cp.schedule import HEADER_BYTES

CHANNELS = ("kv", "grad", "agreement", "gather", "heads")
RING_CHANNELS = ("kv", "grad", "heads")
POOL_BUFFERS = 4  # keys and values, and their gradients, twice each
_POOL_LEAST_BYTES = 1 << 16


@dataclass
class Counters:
    """Messages and bytes that this rank has sent, by channel; headers are included."""

    messages: Counter[str] = field(default_factory=Counter)
    size_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def ring_messages(self) -> int:
        """Messages of keys, values, gradients and heads: what `traffic` of a plan counts."""
        return sum(self.messages[channel] for channel in RING_CHANNELS)

    @property
    def ring_bytes(self) -> int:
        """Bytes of keys, values, gradients and heads: what `traffic` of a plan counts."""
        return sum(self.size_bytes[channel] for channel in RING_CHANNELS)

    def reset(self) -> None:
        """Start again from zero."""
        self.messages.clear()
        self.size_bytes.clear()


class BufferPool:
    """Buffers that no call uses; see Note [The pool]. Thread-safe."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    def take(self, size_bytes: int, device: torch.device) -> Tensor:
        """A buffer with unspecified contents."""
        with self._lock:
            for index, buffer in enumerate(self._free):
                if buffer.numel() == size_bytes and buffer.device == device:
                    return self._free.pop(index)
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody reads or writes this buffer any more."""
        if debug_enabled():
            buffer.fill_(0xFF)
        if buffer.numel() >= _POOL_LEAST_BYTES:
            with self._lock:
                self._free = [*self._free, buffer][-POOL_BUFFERS:]


class Parcel:
    """A tensor that travels, in two owned buffers; see Note [Two buffers]."""

    def __init__(
        self,
        pool: BufferPool,
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
        self._pool, self._device = pool, device
        self._here: Tensor | None = None  # a parcel that only receives needs one buffer, not two
        self._spare: Tensor | None = None  # a ring of one never needs it

    @property
    def payload(self) -> Tensor:
        """What is here now."""
        return self._buffer()[HEADER_BYTES:].view(self.dtype).view(self.shape)

    def _buffer(self) -> Tensor:
        if self._here is None:
            self._here = self._pool.take(self.size_bytes, self._device)
        return self._here

    def here(self) -> Tensor:
        """The buffer of what is here, header included."""
        return self._buffer()

    def has_nan(self) -> bool:
        """Whether what is here holds a NaN; never where it is not floating point."""
        return self.dtype.is_floating_point and bool(self.payload.isnan().any())

    def spare(self) -> Tensor:
        """The buffer that receives."""
        if self._spare is None:
            self._spare = self._pool.take(self.size_bytes, self._device)
        return self._spare

    def release(self) -> None:
        """Give both buffers back; the payload must not be used any more."""
        for buffer in (self._here, self._spare):
            if buffer is not None:
                self._pool.give_back(buffer)
        self._here = self._spare = None

    def swap(self) -> None:
        """What came in becomes what is here."""
        here, self._here = self._here, self.spare()
        self._spare = here
        if debug_enabled() and here is not None:
            here.fill_(0xFF)  # NaN in every floating dtype

    def outgoing(self, header: list[int]) -> Tensor:
        """The buffer to send, with its header written."""
        self._buffer()[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(header))
        return self._buffer()

    def header_received(self) -> Tensor:
        """The header of what came in."""
        return self.spare()[:HEADER_BYTES].view(torch.int64)
