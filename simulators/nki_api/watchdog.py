"""Ends a kernel that runs on without an instruction: `while True: pass` is an error, not a hang.

One thread looks at every kernel in progress. What counts is processor time of the kernel's thread
since its last instruction, and ten times as much wall time (a kernel that sleeps), except at a
debugger's prompt. A core that waits for others is left alone: deadlocks are found by the
scheduler. The exception appears in the kernel's own thread at the line that it is on, so it cannot
end a single call that never returns (a lock held by nobody).

Source of the method: Python/C API, PyThreadState_SetAsyncExc.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, TracebackType
from typing import Any

from .errors import NkiValidationError, blamed, message, outside
from .rules import inferred

_ENDLESS = inferred(
    "kernel.endless",
    "this simulator's SimParams.stall_seconds",
    "a kernel issues an instruction every now and then, and ends",
)
WALL_FACTOR = 10
PERIODS = 4  # looks per limit
_DEBUGGERS = frozenset(("pdb", "bdb", "pydevd", "debugpy", "IPython"))


class _Stalled(BaseException):
    """Thrown into a kernel's thread."""


class _Watch:
    """One kernel in one thread. `progress` gives its instructions so far, None while it waits."""

    def __init__(self, limit: float, progress: Callable[[], int | None]) -> None:
        self.limit = limit
        self.progress = progress
        self.thread = threading.get_ident()
        self.fired = False
        get_clock = getattr(time, "pthread_getcpuclockid", None)  # not on every system
        self.clock = None if get_clock is None else get_clock(self.thread)
        self._last: int | None = None
        self._restart()

    def _spent(self) -> float:
        return self._wall() if self.clock is None else time.clock_gettime(self.clock)

    def _wall(self) -> float:
        return time.monotonic() / WALL_FACTOR

    def _restart(self) -> None:
        self._spent_then, self._wall_then = self._spent(), self._wall()

    def stalled(self) -> bool:
        """Whether the kernel has done nothing for too long."""
        now = self.progress()
        if now is None or now != self._last or self._debugging():
            self._last = now
            self._restart()
            return False
        worked, waited = self._spent() - self._spent_then, self._wall() - self._wall_then
        return worked > self.limit or waited > self.limit

    def _debugging(self) -> bool:
        frame = sys._current_frames().get(self.thread)
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] in _DEBUGGERS:
                return True
            frame = frame.f_back
        return False

    def throw(self, kind: type[BaseException] | None) -> None:
        """Make the exception appear in the kernel's thread; None takes it back."""
        self.fired = kind is not None
        thrown = None if kind is None else ctypes.py_object(kind)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), thrown)


class _Watchdog:
    """The watches in progress, and the thread that looks at them while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watches: list[_Watch] = []
        self._thread: threading.Thread | None = None

    def add(self, watch: _Watch) -> None:
        with self._changed:
            self._watches.append(watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="nki-watch", daemon=True)
                self._thread.start()
            elif len(self._watches) == 1:
                self._changed.notify()

    def remove(self, watch: _Watch) -> None:
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)
                if watch.fired:
                    watch.throw(None)

    def _look(self) -> None:
        with self._changed:
            while True:
                for watch in self._watches:
                    if watch.stalled():
                        watch.throw(_Stalled)
                pauses = [watch.limit / PERIODS for watch in self._watches]
                self._changed.wait(min(pauses, default=None))


_WATCHDOG = _Watchdog()


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _WATCHDOG
    _WATCHDOG = _Watchdog()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def watched(
    limit: float | None, progress: Callable[[], int | None], function: Any
) -> Iterator[None]:
    """Raise NkiValidationError in this block, a kernel, after `limit` seconds without progress."""
    if limit is None:
        yield
        return
    watch, dog = _Watch(limit, progress), _WATCHDOG
    try:
        try:
            dog.add(watch)
            yield
        finally:
            dog.remove(watch)
    except _Stalled as error:
        dog.remove(watch)
        detail = f"no instruction for {limit:g} s of processor time (SimParams.stall_seconds)"
        with blamed(_innermost(error.__traceback__), function):
            text = message(_ENDLESS, "nki.jit", detail, {})
        raise NkiValidationError(text) from None  # a traceback without lines breaks what prints it


def _innermost(traceback: TracebackType | None) -> tuple[str, int]:
    """File and line of the user's frame that the exception appeared in."""
    place = ("", 0)
    while traceback is not None:
        if outside(traceback.tb_frame):
            code = traceback.tb_frame.f_code
            place = code.co_filename, _line(code, traceback.tb_lasti)
        traceback = traceback.tb_next
    return place


def _line(code: CodeType, instruction: int) -> int:
    """Line of an instruction, or the last before it: a loop's jump back may have none."""
    lines = [line for start, _, line in code.co_lines() if line and start <= instruction]
    return lines[-1] if lines else code.co_firstlineno
