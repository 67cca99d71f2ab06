"""Counters of a trace: memory in use, and DMA, HBM and TensorE rates over windows of a microsecond.

Does: turn a timeline into counter events of the Trace Event Format. Does not: write slices
(trace.py).
"""

from __future__ import annotations

from .dma import Transfer
from .timeline import Timeline
from .trace_events import Event, counter

RATE_WINDOW_NS = 1000.0


def counters(line: Timeline, pid: int) -> list[Event]:
    """All counter events of one core."""
    return [*_memory(line, pid), *_rates(line, pid)]


def _memory(line: Timeline, pid: int) -> list[Event]:
    """Bytes per partition in use in SBUF and PSUM, from first write to last use."""
    program = line.program
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for record in range(len(program)):
        for view in (*program.writes[record], *program.reads[record]):
            buffer = program.accesses[view].buffer
            first[buffer] = min(first.get(buffer, line.start[record]), line.start[record])
            last[buffer] = max(last.get(buffer, 0.0), line.end[record])
    out = []
    for space in ("sbuf", "psum"):
        changes: dict[float, int] = {}
        for buffer, begin in first.items():
            info = program.log.buffers[buffer]
            if info.space == space:
                changes[begin] = changes.get(begin, 0) + info.row_bytes
                changes[last[buffer]] = changes.get(last[buffer], 0) - info.row_bytes
        used = 0
        for moment in sorted(changes):
            used += changes[moment]
            out.append(counter(f"{space} bytes per partition", moment, used, pid))
    return out


def _rates(line: Timeline, pid: int) -> list[Event]:
    """DMA and HBM GB/s and TensorE columns per ns, averaged over windows of a microsecond."""
    program = line.program
    steps = int(line.total_ns // RATE_WINDOW_NS) + 1
    dma, hbm, columns = [0.0] * steps, [0.0] * steps, [0.0] * steps
    for record, (begin, end) in line.transfer.items():
        cost = program.costs[record]
        size = float(cost.size_bytes) if isinstance(cost, Transfer) else 0.0
        sides = [program.accesses[v] for v in (*program.writes[record], *program.reads[record])]
        in_hbm = sum(side.size_bytes for side in sides if side.space == "hbm")
        _spread(dma, begin, end, size)
        _spread(hbm, begin, end, float(in_hbm))
    for record, queue in enumerate(program.queues):
        if queue == "tensor":
            moved = program.accesses[program.reads[record][-1]].elements
            _spread(columns, line.start[record], line.free[record], float(moved))
    out = []
    for title, values in (("DMA GB/s", dma), ("HBM GB/s", hbm), ("PE columns per ns", columns)):
        for step, amount in enumerate(values):
            rate = round(amount / RATE_WINDOW_NS, 3)
            out.append(counter(title, step * RATE_WINDOW_NS, rate, pid))
    return out


def _spread(values: list[float], begin: float, end: float, amount: float) -> None:
    """Add `amount`, spread evenly from begin to end, to the windows."""
    length = max(end - begin, 1e-9)
    for step in range(int(begin // RATE_WINDOW_NS), int(end // RATE_WINDOW_NS) + 1):
        inside = min(end, (step + 1) * RATE_WINDOW_NS) - max(begin, step * RATE_WINDOW_NS)
        if step < len(values) and inside > 0:
            values[step] += amount * inside / length
