"""A ring pass as Chrome/Perfetto JSON: one process per rank, a lane for computing and one for hops.

Does: draw RingTimes. Does not: draw what happens inside a step (timing.trace does, per kernel).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nxd_cp.schedule import Plan

from .ring import RingTimes

COMPUTE, MESSAGES = 1, 2


def document(plan: Plan, times: RingTimes, *, max_ranks: int = 64) -> dict[str, Any]:
    """The trace of the first `max_ranks` ranks; timestamps in microseconds, as the format wants."""
    events: list[dict[str, Any]] = []
    for rank in range(min(plan.size, max_ranks)):
        events += _rank(plan, times, rank)
    other = {"note": "estimated, not measured", "guess_share": round(times.guess_share, 4)}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def write(path: Path, plan: Plan, times: RingTimes, *, max_ranks: int = 64) -> None:
    """Write the trace to `path`."""
    path.write_text(json.dumps(document(plan, times, max_ranks=max_ranks)))


def _rank(plan: Plan, times: RingTimes, rank: int) -> list[dict[str, Any]]:
    out = [_name("process_name", rank, 0, f"rank {rank}")]
    out += [_name("thread_name", rank, COMPUTE, "compute")]
    out += [_name("thread_name", rank, MESSAGES, "keys and values in")]
    for index, step in enumerate(plan.steps[rank]):
        begin, end = float(times.start[index, rank]), float(times.end[index, rank])
        waited = begin - (float(times.end[index - 1, rank]) if index else 0.0)
        tiles = ", ".join(map(str, step.tiles)) or "nothing"
        args = {"kv of": step.owner, "tiles": tiles, "wait_us": round(waited / 1e3, 3)}
        out.append(_slice(f"step {index}", "compute", rank, COMPUTE, begin, end, args))
        if step.kv is None or step.kv.source is None:
            continue
        arrival = float(times.arrival[index + 1, rank])
        sent = max(begin, float(times.start[index, step.kv.source]))
        out.append(
            _slice(
                f"hop {index}", "message", rank, MESSAGES, sent, arrival, {"from": step.kv.source}
            )
        )
        ident = rank * 10**6 + index
        flow = {"name": "kv", "cat": "message", "id": ident}
        out.append({**flow, "ph": "s", "pid": step.kv.source, "tid": COMPUTE, "ts": sent / 1e3})
        out.append(
            {
                **flow,
                "ph": "f",
                "bp": "e",
                "pid": rank,
                "tid": COMPUTE,
                "ts": float(times.start[index + 1, rank]) / 1e3,
            }
        )
    return out


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(
    name: str, category: str, pid: int, tid: int, begin: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": begin / 1e3,
        "dur": (end - begin) / 1e3,
        "args": args,
    }
