"""A log made ready for timing: queues and costs of all records.

Does: resolve every record once, give it a queue and a cost. Does not: work out what waits for what
(edges.py) or place anything in time (machine.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nxd_cp.simulators.nki_api import log as flags
from nxd_cp.simulators.nki_api.log import NONE, WIDTH, Exchange, Log

from .access import Access, resolve
from .collective import collective_cost
from .constants import Values
from .cost import Cost, instruction_cost
from .dma import Transfer, transfer
from .edges import Edge, dependency_edges


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read a log.

    granularity: "byte" or "tensor" dependencies, or "fenced": bytes on chip, whole tensors in HBM,
    as compilers of the older language had. order: "program" keeps each engine's instructions in
    program order; "list" lets an engine take any ready instruction among its next `window`, as a
    compiler's scheduler would have (16 fits the profiled attention kernels best; a guess).
    dma_queues: "direction" is one queue for loads and one for stores; "line" is one per source
    line, with no shared generator, as compilers did before dynamic descriptor generation.
    """

    granularity: Literal["byte", "fenced", "tensor"] = "byte"
    order: Literal["program", "list"] = "list"
    window: int = 16
    dma_queues: Literal["direction", "line"] = "direction"


class Program:
    """A log, resolved for one generation and one set of values. Lists are indexed by record."""

    def __init__(self, log: Log, generation: str, values: Values, options: Options) -> None:
        self.log = log
        self.generation = generation
        self.values = values
        self.options = options
        self.accesses = [resolve(view, log.buffers[view.buffer]) for view in log.views]
        self.queues: list[str] = []
        self.costs: list[Cost | Transfer] = []
        self.barriers: set[int] = set()
        self.meetings: dict[int, Exchange] = {e.seq: e for e in log.exchanges}
        self.reads: list[tuple[int, ...]] = []
        self.writes: list[tuple[int, ...]] = []
        self.lines: list[int] = []
        self.opcodes: list[str] = []
        self._cost_cache: dict[tuple[object, ...], Cost | Transfer] = {}
        self._resolve()

    @cached_property
    def edges(self) -> list[list[Edge]]:
        """Predecessors of every record, with the kind of dependency."""
        return dependency_edges(self)

    def __len__(self) -> int:
        return len(self.queues)

    def _resolve(self) -> None:
        rows, names = self.log.rows, self.log.names
        for at in range(0, len(rows), WIDTH):
            opcode, engine, line, elements, bits, detail = rows[at : at + 6]
            views = [v for v in rows[at + 6 : at + WIDTH] if v != NONE]
            dst = rows[at + 6]
            sources = views if dst == NONE else views[1:]
            writes = [] if dst == NONE else [dst]
            reads = sources
            if bits & flags.READ_ACCUMULATOR and sources:
                writes, reads = [*writes, sources[-1]], sources[:-1]
            if bits & flags.ACCUMULATE and dst != NONE:
                reads = [*reads, dst]
            if names[opcode] == "core_barrier":
                writes = [*sources]  # what comes after it in this buffer waits for it
            self.reads.append(tuple(reads))
            self.writes.append(tuple(writes))
            self.lines.append(line)
            self.opcodes.append(names[opcode])
            self._add(
                names[opcode], names[engine], names[detail], bits, elements, dst, sources, line
            )

    def _add(
        self,
        opcode: str,
        engine: str,
        detail: str,
        bits: int,
        elements: int,
        dst: int,
        sources: list[int],
        line: int,
    ) -> None:
        record = len(self.queues)
        target = None if dst == NONE else self.accesses[dst]
        given = tuple(self.accesses[s] for s in sources)
        if opcode == "loop_iteration":
            self.barriers.add(record)
            self.queues.append("all")
            self.costs.append(
                Cost(
                    (("loop_iteration", self.values.loop_iteration),),
                    (("loop_iteration", self.values.loop_iteration),),
                )
            )
            return
        if engine == "cc":
            self.costs.append(collective_cost(self.meetings[record], self.values))
            self.queues.append("collectives")
            return
        key = (opcode, engine, detail, bits, elements, _kind(target), *map(_kind, given))
        cost = self._cost_cache.get(key)
        if cost is None:
            if engine == "dma":
                assert target is not None, f"{opcode} without a destination"
                cost = transfer(self.generation, opcode, detail, bits, target, given, self.values)
            else:
                cost = instruction_cost(
                    self.generation,
                    opcode,
                    engine,
                    detail,
                    bits,
                    elements,
                    target,
                    given,
                    self.values,
                )
            self._cost_cache[key] = cost
        self.costs.append(cost)
        if engine == "all":
            self.queues.append("sync")
        else:
            on_dma = engine == "dma"
            self.queues.append(self._dma_queue(target, line, detail) if on_dma else engine)

    def _dma_queue(self, target: Access | None, line: int, detail: str) -> str:
        if ":" in detail:
            return f"dma {detail.split(':')[1]}"
        if self.options.dma_queues == "line":
            return f"dma line {self.log.lines[line][1]}"
        store = target is not None and target.space == "hbm"
        return "dma store" if store else "dma load"


def _kind(access: Access | None) -> object:
    """What of an access can change a cost: not where it lies, but its shape and side."""
    if access is None:
        return None
    return (
        access.space,
        access.partitions,
        access.first_partition,
        access.elements,
        access.itemsize,
        access.run_bytes,
        access.inner_stride_bytes,
    )
