"""A limit on one row: processor time, so that a busy machine does not change what is skipped.

Wall time has a limit, too, ten times as long, for a row that waits for nothing. Main thread only
(signals); POSIX only.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
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
