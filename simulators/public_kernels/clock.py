"""Limits on a row: processor time, so that a busy machine does not change what is skipped; memory.

Wall time has a limit, too, ten times as long, for a row that waits for nothing. Main thread only
(signals); POSIX only.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 10  # wall seconds per second of processor time


class RowTimeout(Exception):
    """A row took longer than it may."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise RowTimeout in the block after `seconds` of processor time; 0 means never."""
    if not seconds:
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise RowTimeout(f"longer than {seconds:g} s")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, 1),
        (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE),
    )
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, factor in timers:
        signal.setitimer(timer, seconds * factor)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def limit_memory(gigabytes: float) -> None:
    """Let allocations beyond so much address space raise in this process; 0 means no limit."""
    if gigabytes:
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def too_much(causes: Iterable[BaseException], gigabytes: float) -> str:
    """Why an error only says that a row is too large for the limits; '' when it does not."""
    for cause in causes:
        if isinstance(cause, RowTimeout):
            return str(cause)
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return f"needs more than {gigabytes:g} GB"
    return ""
