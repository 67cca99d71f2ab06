"""A timeline as Chrome/Perfetto JSON: open it at ui.perfetto.dev or chrome://tracing.

Does: write one process per rank and core, one lane per engine, DMA queue and transfer, slices with
operands, source line and wait, flow arrows from producer to consumer, and counters. Does not: time
anything, or know the format (trace_events.py). Field names follow neuron-profile where it has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .access import Access
from .constants import constants_for
from .counters import counters
from .critical import guess_share
from .dma import Transfer
from .timeline import Timeline
from .trace_events import Event, arrow, complete, named

LANES = ("tensor", "vector", "scalar", "gpsimd", "sync", "collectives")


def events(line: Timeline, *, pid: int = 0, name: str = "rank 0 core 0") -> list[Event]:
    """The trace events of one core."""
    lanes = _lanes(line)
    out = [named("process_name", pid, 0, name)]
    out += [named("thread_name", pid, tid, lane) for lane, tid in lanes.items()]
    idle = _idle_before(line)
    for record in range(len(line.program)):
        out.append(_slice(line, record, pid, lanes, idle[record]))
        out += _arrow(line, record, pid, lanes)
    out += _transfers(line, pid, lanes)
    out += counters(line, pid)
    return out


def document(parts: Mapping[str, Timeline]) -> dict[str, Any]:
    """A whole trace of several cores, by the name of their process."""
    listed: list[Event] = []
    for pid, (name, line) in enumerate(parts.items()):
        listed += events(line, pid=pid, name=name)
    listed += _meetings(list(parts.values()))
    generations = sorted({line.program.generation for line in parts.values()})
    other = {
        "target": ", ".join(generations),
        "note": "estimated, not measured",
        "constants": {name: constants_for(name).note for name in generations},
        "guess_share": {name: round(guess_share(line), 4) for name, line in parts.items()},
    }
    return {"traceEvents": listed, "displayTimeUnit": "ns", "otherData": other}


def write(path: Path, parts: Mapping[str, Timeline]) -> None:
    """Write the trace of `parts` to `path`."""
    path.write_text(json.dumps(document(parts)))


def _lanes(line: Timeline) -> dict[str, int]:
    queues = set(line.program.queues)
    ordered = [lane for lane in LANES if lane in queues] + sorted(queues - set(LANES))
    ordered += [f"{queue} transfers" for queue in ordered if queue.startswith("dma")]
    return {lane: tid for tid, lane in enumerate(ordered, start=1)}


def _idle_before(line: Timeline) -> list[float]:
    """Per record, how long its queue had nothing to do before it started, ns."""
    free = dict.fromkeys(line.program.queues, line.program.values.kernel_start)
    idle = [0.0] * len(line.program)
    for record in sorted(range(len(idle)), key=lambda i: (line.start[i], i)):
        queue = line.program.queues[record]
        idle[record] = max(0.0, line.start[record] - free[queue])
        free[queue] = max(free[queue], line.free[record])
    return idle


def _slice(line: Timeline, record: int, pid: int, lanes: dict[str, int], idle: float) -> Event:
    program = line.program
    queue, opcode = program.queues[record], program.opcodes[record]
    file, number = program.log.lines[program.lines[record]]
    waited = line.wait_on[record]
    args: dict[str, Any] = {
        "record": record,
        "nki_source_location": f"{file}:{number}",
        "operands": ", ".join(
            _operand(program.accesses[v]) for v in (*program.writes[record], *program.reads[record])
        ),
        "wait": line.wait_kind[record],
        "wait_ns": round(idle, 3),
        "latency_ns": round(line.end[record] - line.start[record], 3),
    }
    if waited >= 0:
        args["wait_on"] = waited
    if record in line.cold:
        args["cold"] = True
    exchange = program.meetings.get(record)
    if exchange is not None:
        since = line.meetings.get(record, (line.start[record], "", -1))[0]
        args["members"] = [f"rank {rank} core {core}" for rank, core in exchange.members]
        args["group"] = list(exchange.group)
        args["bytes"] = exchange.bytes_sent
        args["waited_ns"] = round(line.start[record] - since, 3)
    return complete(opcode, queue, line.start[record], line.free[record], pid, lanes[queue], args)


def _transfers(line: Timeline, pid: int, lanes: dict[str, int]) -> list[Event]:
    """Slices of the data that DMAs move; a lane shows no two at once, `began_us` is the truth."""
    program = line.program
    out: list[Event] = []
    shown: dict[int, float] = {}
    for record in sorted(line.transfer, key=lambda i: (line.transfer[i], i)):
        begin, end = line.transfer[record]
        cost = program.costs[record]
        size = cost.size_bytes if isinstance(cost, Transfer) else 0
        lane = lanes[f"{program.queues[record]} transfers"]
        first = min(end, max(begin, shown.get(lane, 0.0)))
        shown[lane] = max(end, shown.get(lane, 0.0))
        rate = round(size / (end - begin), 1) if end > begin else 0.0
        args = {"record": record, "bytes": size, "GB/s": rate, "began_us": begin / 1e3}
        name = f"{program.opcodes[record]} data"
        out.append(complete(name, "dma", first, end, pid, lane, args))
    return out


def _operand(access: Access) -> str:
    return f"{access.space}[{access.partitions}x{access.elements}x{access.itemsize}B]"


def _arrow(line: Timeline, record: int, pid: int, lanes: dict[str, int]) -> list[Event]:
    """A flow arrow from the producer whose data this record waited for."""
    before, kind = line.wait_on[record], line.wait_kind[record]
    if before < 0 or kind not in ("data", "war", "waw", "bank", "space"):
        return []
    tail, head = (
        (pid, lanes[line.program.queues[one]], line.start[one]) for one in (before, record)
    )
    return arrow(kind, "wait", pid * 10**9 + record, tail, head)


def _meetings(lines: list[Timeline]) -> list[Event]:
    """Arrows between processes, from the core that came last to those that waited for it."""
    members: dict[int, list[tuple[int, int]]] = {}
    for pid, line in enumerate(lines):
        for record, exchange in line.program.meetings.items():
            members.setdefault(exchange.meeting, []).append((pid, record))
    lanes = [_lanes(line) for line in lines]

    def at(pid: int, record: int) -> tuple[int, int, float]:
        line = lines[pid]
        return pid, lanes[pid][line.program.queues[record]], line.start[record]

    out: list[Event] = []
    for meeting, there in members.items():
        waited = [(pid, record) for pid, record in there if record in lines[pid].meetings]
        last = next((member for member in there if member not in waited), None)
        if last is None:
            continue
        for pid, record in waited:
            ident = 10**15 + meeting * 10**4 + pid
            out += arrow("meeting", "wait", ident, at(*last), at(pid, record))
    return out
