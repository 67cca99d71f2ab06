"""Cooperative threads for ranks and cores: exactly one runs, and hands the baton on when it waits.

Switches happen only where a task waits for others, so a run is deterministic; when nobody can go
on, that is a deadlock, known at once. One task alone runs in the caller's thread. The first
exception of any task ends all of them: the others are unwound where they wait.
Does not know what tasks do or wait for, beyond a sentence to print.
"""

from __future__ import annotations

import contextvars
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nxd_cp.simulators.nki_api.errors import NkiDeadlockError


@dataclass(frozen=True, order=True)
class Place:
    """One core of one rank."""

    rank: int
    core: int

    def __str__(self) -> str:
        return f"rank {self.rank} core {self.core}"


class Waiting(Protocol):
    """What a task waits for; `describe` gives the line of a deadlock report."""

    ready: bool

    def describe(self, place: Place) -> str: ...


class _Abandoned(BaseException):
    """Unwinds a task because another one failed."""


class Task:
    """One thread of the run."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.gate = threading.Semaphore(0)
        self.waiting: Waiting | None = None
        self.done = False

    def runnable(self) -> bool:
        """Whether it could go on now."""
        return not self.done and (self.waiting is None or self.waiting.ready)


class Scheduler:
    """Runs one function at every place. `seed` shuffles who goes next; None goes round in order."""

    def __init__(self, places: list[Place], seed: int | None = None) -> None:
        self.tasks = [Task(place) for place in places]
        self._by_place = {task.place: task for task in self.tasks}
        self._failure: BaseException | None = None
        self._finished = threading.Semaphore(0)
        self._random = None if seed is None else random.Random(seed)

    def run(self, body: Callable[[Place], None]) -> None:
        """body(place) at every place, to the end; re-raises the first exception of any."""
        if len(self.tasks) == 1:
            body(self.tasks[0].place)
            return
        threads = []
        for task in self.tasks:
            arguments = (task, contextvars.copy_context(), body)
            threads.append(threading.Thread(target=self._main, args=arguments, daemon=True))
            threads[-1].start()
        self._choose(self.tasks[-1]).gate.release()
        try:
            self._finished.acquire()
        except BaseException as error:  # Ctrl-C: the threads unwind at their next wait
            self._failure = error
            raise
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def wait(self, place: Place, waiting: Waiting) -> None:
        """Let others run until `waiting.ready`. The calling task must be the one at `place`."""
        task = self._by_place[place]
        task.waiting = waiting
        following = self._choose(task)
        if following is not task:
            following.gate.release()
            task.gate.acquire()
        task.waiting = None
        if self._failure is not None:
            raise self._failure if len(self.tasks) == 1 else _Abandoned

    def waits(self, place: Place) -> bool:
        """Whether the task at `place` waits for others."""
        return self._by_place[place].waiting is not None

    def finished(self, place: Place) -> bool:
        """Whether the task at `place` has ended."""
        return self._by_place[place].done

    def _main(
        self, task: Task, context: contextvars.Context, body: Callable[[Place], None]
    ) -> None:
        task.gate.acquire()
        try:
            if self._failure is None:
                context.run(body, task.place)
        except _Abandoned:
            pass
        except BaseException as error:
            if self._failure is None:
                self._failure = _with_note(error, task.place)
        task.done = True
        if all(other.done for other in self.tasks):
            self._finished.release()
        else:
            self._choose(task).gate.release()

    def _choose(self, task: Task) -> Task:
        """Who runs next: whoever can, after `task` in order; on a failure, whoever is left."""
        at = self.tasks.index(task) + 1
        order = self.tasks[at:] + self.tasks[:at]
        if self._failure is None:
            ready = [other for other in order if other.runnable()]
            if ready:
                return ready[0] if self._random is None else self._random.choice(ready)
            self._failure = NkiDeadlockError(self._report())
        return next(other for other in order if not other.done)

    def _report(self) -> str:
        lines = ["deadlock: no rank can go on"]
        for task in self.tasks:
            state = "finished" if task.waiting is None else task.waiting.describe(task.place)
            lines.append(f"  {task.place}: {state}")
        return "\n".join(lines)


def _with_note(error: BaseException, place: Place) -> BaseException:
    """Say in the traceback where it happened (shown by Python 3.11 and newer)."""
    notes = [*getattr(error, "__notes__", ()), f"in {place} of the simulated run"]
    error.__notes__ = notes  # type: ignore[attr-defined]
    return error
