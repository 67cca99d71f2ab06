"""Why a timeline is as long as it is: critical path, stalls by cause, time by source line and tag.

Does: walk back from the last record along what each start waited for, so that the pieces add up to
the total. Does not: change any time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .constants import TAGS, constants_for
from .cost import Cost, Parts
from .dma import Transfer
from .timeline import Timeline

HELD = ("engine", "port", "generator", "window")  # waits that end when the engine is free again


@dataclass(frozen=True)
class Piece:
    """One stretch of the critical path: the record that was running, from when to when."""

    record: int
    begin_ns: float
    end_ns: float
    kind: str  # what the next record on the path waited for


def critical_path(line: Timeline) -> list[Piece]:
    """Pieces in time order; they cover the kernel from its start to its end without gaps."""
    if not line.end:
        return []
    record = max(range(len(line.end)), key=lambda i: (max(line.end[i], line.free[i]), i))
    until = max(line.end[record], line.free[record])
    pieces = [Piece(-1, until, line.total_ns, "end")]
    kind = "end"
    while record >= 0:
        begin = line.start[record]
        waited, on = line.wait_kind[record], line.wait_on[record]
        pieces.append(Piece(record, begin, until, kind))
        if waited == "meeting":  # the other cores; then on with what this one had waited for
            alone, waited, on = line.meetings[record]
            pieces.append(Piece(-1, alone, begin, "meeting"))
            begin = alone
        if on < 0:
            pieces.append(Piece(-1, 0.0, begin, "start"))
            break
        record, until, kind = on, begin, waited
    return [piece for piece in reversed(pieces) if piece.end_ns > piece.begin_ns]


def time_by_tag(line: Timeline) -> dict[str, float]:
    """ns of the critical path per tag of the constants that it rests on; the sum is the total."""
    constants = constants_for(line.program.generation)
    totals = dict.fromkeys(TAGS, 0.0)
    for piece in critical_path(line):
        parts = _parts(line, piece)
        whole = sum(ns for _, ns in parts)
        length = piece.end_ns - piece.begin_ns
        for name, ns in parts:
            totals[constants.tag(name)] += length * ns / whole if whole else 0.0
        if not whole:
            totals["guess"] += length
    return totals


def guess_share(line: Timeline) -> float:
    """Share of the total, 0 to 1, that rests on guesses."""
    return time_by_tag(line)["guess"] / line.total_ns if line.total_ns else 0.0


def _parts(line: Timeline, piece: Piece) -> Parts:
    """What one piece of the path is made of; scaled to its length by the caller."""
    if piece.record < 0:
        name = "collective_start" if piece.kind == "meeting" else f"kernel_{piece.kind}"
        return ((name, piece.end_ns - piece.begin_ns),)
    cost = line.program.costs[piece.record]
    if isinstance(cost, Transfer):
        if piece.kind in HELD:
            return cost.issue
        return (*cost.start, *cost.engine, *cost.done)
    assert isinstance(cost, Cost), "a cost is a Cost or a Transfer"
    hop = () if piece.kind in HELD else (("semaphore", line.program.values.semaphore),)
    load = line.table_load.get(piece.record, 0.0)
    tables = (("table_load", load),) if load else ()
    return (*tables, *(cost.occupancy if piece.kind in HELD else cost.latency), *hop)


def time_by_line(line: Timeline) -> list[tuple[str, int, float]]:
    """(file, line, ns of the critical path), longest first."""
    totals: dict[tuple[str, int], float] = defaultdict(float)
    for piece in critical_path(line):
        if piece.record >= 0:
            key = line.program.log.lines[line.program.lines[piece.record]]
        else:
            waiting = piece.kind == "meeting"
            key = ("waiting for other cores" if waiting else "kernel start and end", 0)
        totals[key] += piece.end_ns - piece.begin_ns
    named = [(file, number, ns) for (file, number), ns in totals.items()]
    return sorted(named, key=lambda item: (-item[2], item[0], item[1]))


def stalls(line: Timeline) -> dict[str, dict[str, float]]:
    """Per queue: idle ns by what the next instruction was waiting for, and "end" after the last."""
    program = line.program
    result: dict[str, dict[str, float]] = {}
    free: dict[str, float] = {}
    for record in sorted(range(len(program)), key=lambda i: (line.start[i], i)):
        queue = program.queues[record]
        gap = line.start[record] - free.get(queue, 0.0)
        if gap > 0:
            causes = result.setdefault(queue, {})
            kind = line.wait_kind[record]
            if kind in ("data", "war", "waw") and line.wait_on[record] >= 0:
                kind = f"{kind} from {program.queues[line.wait_on[record]]}"
            causes[kind] = causes.get(kind, 0.0) + gap
        free[queue] = max(free.get(queue, 0.0), line.free[record])
    for queue, moment in free.items():
        result.setdefault(queue, {})["end"] = max(0.0, line.total_ns - moment)
    return {queue: dict(sorted(causes.items())) for queue, causes in sorted(result.items())}
