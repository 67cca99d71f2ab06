"""What every transport does in the same way.

Does: open numbered calls, remember that a group was left half done, gather and add tensors round
the ring. Does not: move a byte itself (`distributed.py`, `local.py`).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nxd_cp.schedule import Move, Plan
from nxd_cp.transport.call import Call
from nxd_cp.transport.errors import RingError
from nxd_cp.transport.parcel import BufferPool, Counters


class Transport(ABC):
    """One rank's end of a ring. Not shared between ranks; calls are numbered in order."""

    can_agree = True  # False where ranks cannot read what another sent
    verifies_at_once = True  # False where reading a header would stall an accelerator
    joins_every_hop = False  # True where a hop is a collective, also of ranks without a message

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.global_ranks = list(range(size))  # of the group ranks, in the world of all processes
        self.device = torch.device("cpu")  # of messages that are not the caller's tensors
        self.context = 1  # among the contexts of one process group
        self.counters = Counters()
        self.buffers = BufferPool()
        self.num_calls = self.num_calls_started = 0
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread: int | None = None  # that is in a call, or in calls within a call
        self._depth = 0
        self._failure: str | None = None

    def call(self, kind: str) -> Call:
        """Open the next numbered call. Raises RingError when an earlier one broke the group."""
        self.check_usable()
        with self._lock:
            self._check_thread()
            self.num_calls += 1
            return Call(self, kind, self.num_calls)

    def enter_call(self) -> None:
        """This thread is in a call now. Raises RingError while another thread is."""
        with self._lock:
            self._check_thread()
            self._thread, self._depth = threading.get_ident(), self._depth + 1

    def leave_call(self) -> None:
        """The counterpart of `enter_call`."""
        with self._lock:
            self._depth -= 1
            self._thread = self._thread if self._depth else None

    def _check_thread(self) -> None:
        """Which of two threads comes first is chance, on each rank: their messages would mix."""
        if self._thread not in (None, threading.get_ident()):
            raise RingError(
                f"rank {self.rank}: another thread is in a call of this context; make calls from "
                "one thread at a time, in the same order on all ranks, or give each thread a "
                "process group and a context of its own"
            )

    def validate(self, plan: Plan, *, packed: bool) -> None:
        """Raise ValueError for a plan that this transport cannot carry; packed: with documents."""
        assert plan.size == self.size, f"a plan of {plan.size} ranks in a group of {self.size}"

    def next_place(self) -> int:
        """The place of a call that starts its first hop now: 1 for the first."""
        with self._lock:
            self.num_calls_started += 1
            return self.num_calls_started

    def fail(self, reason: str) -> None:
        """Mark this end as unusable: messages may be left in flight. The first reason stays."""
        if self._failure is None:
            self._failure = reason

    def check_usable(self) -> None:
        """Raise RingError when an earlier call was left half done, or in a forked process."""
        if os.getpid() != self._process:
            raise RingError(
                f"rank {self.rank}: expected a call from the process that made this context, got "
                "one from a process forked from it, which the other ranks do not know (a worker of "
                "a DataLoader, say); call it in the training process"
            )
        if self._failure is not None:
            raise RingError(
                f"rank {self.rank}: this group cannot be used any more ({self._failure}); "
                "make a new process group and context"
            )

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; equal shapes and dtypes."""
        found = {self.rank: tensor.clone()}
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with self.call("all_gather") as call:
            here = call.parcel("gather", tuple(tensor.shape), tensor.dtype, tensor.device)
            here.payload.copy_(tensor)
            for distance in range(1, self.size):
                move = Move(to, source, brings=(self.rank - distance) % self.size)
                found[move.brings] = call.start(here, move).wait().clone()
        return [found[rank] for rank in range(self.size)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same on every rank; the argument is left as it is."""
        total, *others = self.all_gather(tensor)
        for other in others:
            total += other
        return total

    @abstractmethod
    def post(self, out: Tensor | None, into: Tensor | None, move: Move, channel: str) -> Any:
        """Begin to send `out` and to receive into `into`; return what `complete` needs.

        out is None when `move.to` is, into is None when `move.source` is; both only where
        `joins_every_hop` is set.
        """

    @abstractmethod
    def complete(self, ticket: Any) -> None:
        """Block until both are done. Raises RingError when a rank is lost or late."""
