"""The few kinds of event that traces here are made of, in the Trace Event Format.

Does: build metadata, slices, arrows and counters from moments in ns. Does not: decide what to draw
(trace.py, counters.py, simulators.cluster.trace).

Note [Whole nanoseconds]
    Perfetto keeps whole nanoseconds. It rounds `ts` and `dur` each by itself, and drops a slice
    that then begins before its neighbour on the lane has ended; so begin and end are rounded here,
    and their difference is the duration. Of events at one moment it takes the first in the file
    first, and hangs an arrow on the slice that is open by then; so arrows come after the slices.

Source: Trace Event Format (Google); the importer of Perfetto's trace processor.
"""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]


def named(what: str, pid: int, tid: int, name: str) -> Event:
    """The name of a process or thread: `what` is "process_name" or "thread_name"."""
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def complete(
    name: str,
    category: str,
    begin_ns: float,
    end_ns: float,
    pid: int,
    tid: int,
    args: dict[str, Any],
) -> Event:
    """A slice of a lane."""
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": _microseconds(begin_ns),
        "dur": (round(end_ns) - round(begin_ns)) / 1e3,
        "args": args,
    }


def arrow(
    name: str,
    category: str,
    ident: int,
    begin: tuple[int, int, float],
    end: tuple[int, int, float],
) -> list[Event]:
    """From one slice to another; each is (pid, tid, ns at which the slice begins)."""
    base = {"name": name, "cat": category, "id": ident}
    tail, head = (
        {**base, "pid": pid, "tid": tid, "ts": _microseconds(moment)}
        for pid, tid, moment in (begin, end)
    )
    return [{**tail, "ph": "s"}, {**head, "ph": "f", "bp": "e"}]


def counter(title: str, moment_ns: float, value: float, pid: int) -> Event:
    """The value of a counter of a process, from a moment on."""
    return {
        "name": title,
        "ph": "C",
        "pid": pid,
        "ts": _microseconds(moment_ns),
        "args": {"value": value},
    }


def _microseconds(ns: float) -> float:
    return round(ns) / 1e3
