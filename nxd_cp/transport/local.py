"""Messages between N ranks that are threads of one process.

Does: meet (a receiver copies from its sender's buffer and tells it), wake everyone when one rank
fails, and raise when a rank waits for one that has already returned. Does not: use
torch.distributed.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nxd_cp.schedule import Move
from nxd_cp.transport.base import Transport
from nxd_cp.transport.errors import RingError


@dataclass
class _Letter:
    tensor: Tensor
    taken: bool = False


@dataclass
class _Ticket:
    move: Move
    letter: _Letter | None  # ours, until the receiver has copied it
    into: Tensor | None
    index: int  # which of the source's letters to us this one is


class LocalSession:
    """What the ranks of one `run` share: letters on their way, and the first failure."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._changed = threading.Condition()
        self._letters: dict[tuple[int, int, int], _Letter] = {}
        self._returned: set[int] = set()
        self._closed = False
        self.failed_rank: int | None = None
        self._error: BaseException | None = None

    def fail(self, rank: int, error: BaseException) -> None:
        """Record the first error and wake every rank that waits."""
        with self._changed:
            if self.failed_rank is None:
                self.failed_rank, self._error = rank, error
            self._changed.notify_all()

    def returned(self, rank: int) -> None:
        """`rank` will send nothing more."""
        with self._changed:
            self._returned.add(rank)
            self._changed.notify_all()

    def close(self) -> None:
        """No rank runs any more, or yet."""
        self._closed = True

    def check_open(self, rank: int) -> None:
        """Raise RingError where nobody can answer, and not after a timeout."""
        if self._closed:
            raise RingError(
                f"rank {rank}: this local context is used outside `run`, where no other rank "
                "answers; do it, a backward too, in the function given to LocalGroup.run"
            )

    def put(self, source: int, to: int, index: int, letter: _Letter) -> None:
        with self._changed:
            self._letters[source, to, index] = letter
            self._changed.notify_all()

    def take(self, rank: int, source: int, index: int) -> _Letter:
        key = (source, rank, index)
        self._wait(rank, source, lambda: key in self._letters)
        return self._letters.pop(key)

    def acknowledge(self, letter: _Letter) -> None:
        with self._changed:
            letter.taken = True
            self._changed.notify_all()

    def wait_taken(self, rank: int, to: int, letter: _Letter) -> None:
        self._wait(rank, to, lambda: letter.taken)

    def _wait(self, rank: int, other: int, done: Callable[[], bool]) -> None:
        def settled() -> bool:
            return done() or self.failed_rank is not None or other in self._returned

        with self._changed:
            in_time = self._changed.wait_for(settled, self.timeout_s)
            if done():
                return
            if self.failed_rank is not None:
                raise RingError(
                    f"rank {rank} stopped because rank {self.failed_rank} failed: {self._error}"
                )
            if in_time:
                raise RingError(f"rank {rank} waits for rank {other}, which has already returned")
            raise RingError(f"rank {rank} waited {self.timeout_s:g} s for rank {other}")


class LocalTransport(Transport):
    """One thread's end of the ring."""

    def __init__(self, rank: int, session: LocalSession) -> None:
        super().__init__(rank, session.size)
        self.enter(session, num_calls=0)

    def enter(self, session: LocalSession, *, num_calls: int) -> None:
        """Begin a new session: nothing in flight, calls numbered from `num_calls` on."""
        self._session = session
        self._failure = None
        self.num_calls = self.num_calls_started = num_calls
        self._num_sent: defaultdict[int, int] = defaultdict(int)
        self._num_received: defaultdict[int, int] = defaultdict(int)

    def post(self, out: Tensor | None, into: Tensor | None, move: Move, channel: str) -> _Ticket:
        self._session.check_open(self.rank)
        ticket = _Ticket(move, None, into, index=0)
        if out is not None and move.to is not None:
            ticket.letter = _Letter(out)
            self._session.put(self.rank, move.to, self._num_sent[move.to], ticket.letter)
            self._num_sent[move.to] += 1
        if move.source is not None:
            ticket.index = self._num_received[move.source]
            self._num_received[move.source] += 1
        return ticket

    def complete(self, ticket: _Ticket) -> None:
        into, move = ticket.into, ticket.move
        if into is not None and move.source is not None:
            letter = self._session.take(self.rank, move.source, ticket.index)
            if letter.tensor.numel() != into.numel():
                raise RingError(
                    f"rank {self.rank} expected {into.numel()} bytes from rank {move.source}, "
                    f"got {letter.tensor.numel()}; the ranks run their rings in a different order"
                )
            into.copy_(letter.tensor)
            self._session.acknowledge(letter)
        if ticket.letter is not None and move.to is not None:
            self._session.wait_taken(self.rank, move.to, ticket.letter)
