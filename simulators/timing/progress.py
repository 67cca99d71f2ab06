"""Says on standard error what a long run is doing and for how long it has been.

Does: print a line per phase, and the seconds while a phase lasts. Does not: know how long it will
take.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

EVERY_S = 2.0


class Progress:
    """`with Progress("simulating") as progress: ...; progress.say("timing")`."""

    def __init__(self, what: str, *, every_s: float = EVERY_S, out: TextIO | None = None) -> None:
        self._what, self._every, self._out = what, every_s, out or sys.stderr
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._show(" ...\n")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def say(self, what: str) -> None:
        """The next phase has begun."""
        with self._lock:
            self._what, self._begin = what, time.monotonic()
            self._show(" ...\n")

    def _tick(self) -> None:
        while not self._stop.wait(self._every):
            with self._lock:
                self._show(f": {time.monotonic() - self._begin:.0f} s\n")

    def _show(self, end: str) -> None:
        self._out.write(f"{self._what}{end}")
        self._out.flush()
