"""A ring pass as Chrome/Perfetto JSON: one process per rank, a lane for computing and one for hops.

Does: draw RingTimes. Does not: draw what happens inside a step (timing.trace does, per kernel).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nxd_cp.schedule import Plan
from nxd_cp.simulators.timing.trace_events import Event, arrow, complete, named

from .ring import RingTimes

COMPUTE, MESSAGES = 1, 2


def document(plan: Plan, times: RingTimes, *, max_ranks: int = 64) -> dict[str, Any]:
    """The trace of the first `max_ranks` ranks."""
    drawn = range(min(plan.size, max_ranks))
    events = [event for rank in drawn for event in _rank(plan, times, rank)]
    events += [event for rank in drawn for event in _arrows(plan, times, rank, drawn)]
    other = {"note": "estimated, not measured", "guess_share": round(times.guess_share, 4)}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def write(path: Path, plan: Plan, times: RingTimes, *, max_ranks: int = 64) -> None:
    """Write the trace to `path`."""
    path.write_text(json.dumps(document(plan, times, max_ranks=max_ranks)))


def _rank(plan: Plan, times: RingTimes, rank: int) -> list[Event]:
    out = [named("process_name", rank, 0, f"rank {rank}")]
    out += [named("thread_name", rank, COMPUTE, "compute")]
    out += [named("thread_name", rank, MESSAGES, "keys and values in")]
    for index, step in enumerate(plan.steps[rank]):
        begin, end = float(times.start[index, rank]), float(times.end[index, rank])
        waited = begin - (float(times.end[index - 1, rank]) if index else 0.0)
        tiles = ", ".join(map(str, step.tiles)) or "nothing"
        args = {"kv of": step.owner, "tiles": tiles, "wait_us": round(waited / 1e3, 3)}
        out.append(complete(f"step {index}", "compute", begin, end, rank, COMPUTE, args))
        if step.kv is None or step.kv.source is None:
            continue
        arrival = float(times.arrival[index + 1, rank])
        sent = max(begin, float(times.start[index, step.kv.source]))
        args = {"from": step.kv.source}
        out.append(complete(f"hop {index}", "message", sent, arrival, rank, MESSAGES, args))
    return out


def _arrows(plan: Plan, times: RingTimes, rank: int, drawn: range) -> list[Event]:
    """From the step with which a rank's keys and values were sent to the step that needs them."""
    out: list[Event] = []
    for index, step in enumerate(plan.steps[rank]):
        source = None if step.kv is None else step.kv.source
        if source is None or source not in drawn:
            continue
        tail = (source, COMPUTE, float(times.start[index, source]))
        head = (rank, COMPUTE, float(times.start[index + 1, rank]))
        out += arrow("kv", "message", rank * 10**6 + index, tail, head)
    return out
