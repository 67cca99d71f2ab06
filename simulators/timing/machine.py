"""The machine: replays a program on in-order engines, DMA queues and shared resources.

Does: give every record a start, the moment its engine is free again, and the moment its result is
out, with the reason for its start. Deterministic: equal programs give equal times. Does not: look
at data; a time never changes a result.

Resources: engines and DMA queues; on gen2 one PSUM port for VectorE and ScalarE and one SBUF port
for VectorE and GpSimdE; on gen3 and gen4 VectorE and ScalarE take turns on a PSUM bank; four groups
of four DMA engines; the core's DMA rate, which collectives take from too; the software descriptor
generator; TensorE's clock, halved while it is cold (gen3, gen4).
"""

from __future__ import annotations

import heapq
import math

from .cost import Cost
from .dma import NUM_GROUPS, Transfer
from .order import order
from .program import Program
from .timeline import Timeline


class _Warmth:
    """TensorE's clock: cold until a window was busy enough, cold again after one that was not."""

    def __init__(self, program: Program) -> None:
        self.share = program.values.tensor_cold
        self.window = program.values.tensor_window
        self.enough = program.values.tensor_window_share
        self.warm = self.share == 1.0
        self.index = 0
        self.busy = 0.0

    def factor(self, now: float) -> float:
        """How much longer a matmul takes that starts at `now`."""
        if self.share == 1.0:
            return 1.0
        while now >= (self.index + 1) * self.window:
            self.warm = self.busy >= self.enough * self.window
            carried = max(0.0, self.busy - self.window)
            self.busy, self.index = carried, self.index + 1
        return 1.0 if self.warm else 1.0 / self.share

    def note(self, duration: float) -> None:
        """TensorE was busy for `duration`."""
        self.busy += duration


class Machine:
    """One core: its queues, ports, DMA engines and TensorE's clock, and what is ready."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.warmth = _Warmth(program)
        n = len(program)
        self.line = Timeline(
            program=program,
            start=[0.0] * n,
            free=[0.0] * n,
            end=[0.0] * n,
            wait_kind=["start"] * n,
            wait_on=[-1] * n,
            ready=[0.0] * n,
        )
        self.queue_free: dict[str, float] = {}
        self.queue_last: dict[str, int] = {}
        self.ports: dict[str, tuple[float, int]] = {}
        self.groups = [0.0] * NUM_GROUPS
        self.core = 0.0
        self.busy: dict[str, float] = {}
        self.gen2 = program.generation == "gen2"
        self.followers, self.missing = order(program)
        begin = program.values.kernel_start
        self.line.ready = [begin] * n
        self.heap = [(begin, i) for i, m in enumerate(self.missing) if m == 0]
        heapq.heapify(self.heap)
        self.held: dict[str, list[int]] = {}  # ready records whose queue is busy, by number
        self.woken: dict[str, int] = {}  # of those, the one that is looked at again
        self.met: set[int] = set()
        self.done = 0

    @property
    def next_at(self) -> float:
        """When the next record is ready; infinity when none is."""
        return self.heap[0][0] if self.heap else math.inf

    def step(self) -> int | None:
        """Take the record that is ready first; its number if it has to meet other cores first."""
        ready, record = heapq.heappop(self.heap)
        queue = self.program.queues[record]
        held = self.held.setdefault(queue, [])
        if self.woken.get(queue) == record:
            del self.woken[queue]
        if self.queue_free.get(queue, 0.0) > ready or (held and held[0] < record):
            heapq.heappush(held, record)
            self._wake(queue, self.queue_free[queue])
            return None
        if record in self.program.meetings and record not in self.met:
            return record
        self._commit(record, ready, queue)
        self.done += 1
        self._wake(queue, self.line.free[record])
        for follower, kind in self.followers[record]:
            self._because(follower, self._until(record, kind), kind, record)
            self.missing[follower] -= 1
            if self.missing[follower] == 0:
                heapq.heappush(self.heap, (self.line.ready[follower], follower))
        return None

    def _wake(self, queue: str, moment: float) -> None:
        """The lowest of the records that a queue holds back is looked at again at `moment`."""
        held = self.held.get(queue)
        if held and queue not in self.woken:
            record = self.woken[queue] = heapq.heappop(held)
            if queue in self.queue_last:
                self._because(record, moment, "engine", self.queue_last[queue])
            heapq.heappush(self.heap, (self.line.ready[record], record))

    def meet(self, record: int, moment: float) -> None:
        """All members of the record's meeting are there at `moment`."""
        line = self.line
        self.met.add(record)
        if moment > line.ready[record]:
            line.meetings[record] = (
                line.ready[record],
                line.wait_kind[record],
                line.wait_on[record],
            )
        self._because(record, moment, "meeting", -1)
        heapq.heappush(self.heap, (moment, record))

    def finish(self) -> Timeline:
        """The timeline, once every record is placed."""
        program, line = self.program, self.line
        left = len(program) - self.done
        assert left == 0, f"{left} records wait for each other"
        last = max((max(e, f) for e, f in zip(line.end, line.free, strict=True)), default=0.0)
        line.total_ns = last + program.values.kernel_end
        line.resource_busy = dict(sorted(self.busy.items()))
        return line

    def _because(self, record: int, moment: float, kind: str, on: int) -> None:
        line = self.line
        if moment > line.ready[record]:
            line.ready[record] = moment
            line.wait_kind[record] = kind
            line.wait_on[record] = on

    def _until(self, record: int, kind: str) -> float:
        """When a follower by an edge of this kind may start."""
        if kind == "engine":
            return self.line.free[record]
        if kind == "window":
            return self.line.start[record]
        return self.line.end[record] + self.program.values.semaphore

    def _commit(self, record: int, ready: float, queue: str) -> None:
        line, cost = self.line, self.program.costs[record]
        if isinstance(cost, Transfer):
            self._transfer(record, ready, queue, cost)
        elif queue == "tensor":
            self._matmul(record, ready, cost)
        else:
            self._simple(record, ready, queue, cost)
        self.queue_free[queue] = line.free[record]
        self.queue_last[queue] = record
        self.busy[queue] = self.busy.get(queue, 0.0) + line.free[record] - line.start[record]

    def _simple(self, record: int, ready: float, queue: str, cost: Cost) -> None:
        line = self.line
        start = ready
        for port in self._ports(record, queue):
            free, user = self.ports.get(port, (0.0, -1))
            if free > start:
                start = free
                line.wait_kind[record], line.wait_on[record] = "port", user
        load = self._load_table(cost.table, start, record) if queue == "scalar" else 0.0
        held = cost.occupancy_ns + load
        line.start[record], line.free[record] = start, start + held
        line.end[record] = start + max(held, cost.latency_ns + load)
        if cost.dma:
            self.core = max(self.core, start) + cost.dma
            self.busy["dma core rate"] = self.busy.get("dma core rate", 0.0) + cost.dma
        for port in self._ports(record, queue):
            self.ports[port] = (start + held, record)

    def _load_table(self, table: int | None, start: float, record: int) -> float:
        """How long ScalarE loads a function table; the first load starts with the kernel."""
        if table is None or table == 0:
            return 0.0
        loaded = self.ports.get("table")
        if loaded is not None and loaded[1] == table:
            return 0.0
        values = self.program.values
        begin = values.kernel_start if loaded is None else start
        self.ports["table"] = (0.0, table)
        self.busy["table load"] = self.busy.get("table load", 0.0) + values.table_load
        exposed = max(0.0, begin + values.table_load - start)
        if exposed:
            self.line.table_load[record] = exposed
        return exposed

    def _ports(self, record: int, queue: str) -> tuple[str, ...]:
        """Shared ports that this record holds while it runs: see the module."""
        program = self.program
        if queue not in ("vector", "scalar", "gpsimd"):
            return ()
        if not self.gen2:
            views = program.reads[record] + program.writes[record]
            return tuple(
                f"psum bank of {program.accesses[v].buffer}"
                for v in views
                if program.accesses[v].space == "psum"
            )
        spaces = {program.accesses[v].space for v in program.reads[record] + program.writes[record]}
        ports = []
        if queue in ("vector", "scalar") and "psum" in spaces:
            ports.append("psum port")
        if queue in ("vector", "gpsimd") and "sbuf" in spaces:
            ports.append("sbuf port")
        return tuple(ports)

    def _matmul(self, record: int, ready: float, cost: Cost) -> None:
        line = self.line
        last_free = self.queue_free.get("tensor", -1.0)
        factor = self.warmth.factor(ready)
        start = ready if ready <= last_free + 1.0 else ready + cost.weights * factor
        held = cost.occupancy_ns * factor
        line.start[record], line.free[record] = start, start + held
        line.end[record] = start + held + cost.latency_ns - cost.occupancy_ns
        if factor > 1.0:
            line.cold.add(record)
        self.warmth.note(held)

    def _transfer(self, record: int, ready: float, queue: str, cost: Transfer) -> None:
        line = self.line
        start = ready
        shared = cost.software and self.program.options.dma_queues == "direction"
        if shared:
            free, user = self.ports.get("generator", (0.0, -1))
            if free > start:
                start = free
                line.wait_kind[record], line.wait_on[record] = "generator", user
            self.ports["generator"] = (start + cost.issue_ns, record)
        line.start[record], line.free[record] = start, start + cost.issue_ns
        first = max([start + cost.start_ns, *(self.groups[g] for g in cost.groups)])
        held = cost.engine_ns * cost.group_share
        for group in cost.groups:
            self.groups[group] = max(self.groups[group], start + cost.start_ns) + held
        self.core = max(self.core, first) + cost.core_ns
        last = max(first + cost.engine_ns, self.core)
        line.transfer[record] = (first, last)
        line.end[record] = last + cost.done_ns
        self.busy["dma engines"] = (
            self.busy.get("dma engines", 0.0) + held * len(cost.groups) / NUM_GROUPS
        )
        self.busy["dma core rate"] = self.busy.get("dma core rate", 0.0) + cost.core_ns
