"""Three numbers for a kernel: a bound, an expected time and a pessimistic one.

bound: the busiest resource at the shortest constants, nothing waits. expected: the machine at the
expected constants, engines may reorder a little. pessimistic: the longest constants, strict program
order, dependencies between whole tensors. All three are estimates: nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from nxd_cp.simulators.nki_api import log as flags
from nxd_cp.simulators.nki_api.log import Log

from .constants import constants_for
from .critical import guess_share, time_by_tag
from .dma import NUM_GROUPS, Transfer
from .program import Options, Program
from .timeline import Timeline
from .together import replay, replay_together


@dataclass
class Estimate:
    """The times of one kernel on one core, ns, and the expected timeline.

    bounds: by resource, its work at the shortest constants; the largest is the bound.
    """

    generation: str
    bound_ns: float
    expected_ns: float
    pessimistic_ns: float
    timeline: Timeline
    bounds: dict[str, float]

    @property
    def bound_resource(self) -> str:
        """The busiest resource."""
        return busiest(self.bounds)

    @cached_property
    def guess_share(self) -> float:
        """Share of the expected time that rests on guesses, 0 to 1."""
        return guess_share(self.timeline)

    @cached_property
    def by_tag(self) -> dict[str, float]:
        """ns of the expected time by tag of the constants behind it."""
        return time_by_tag(self.timeline)

    @cached_property
    def tensor_flops(self) -> float:
        """Multiplications and additions of all matmuls, transposes left out."""
        return matmul_flops(self.timeline.program)

    @cached_property
    def mfu(self) -> float:
        """Model flops over what TensorE could do in bf16 in the expected time."""
        peak = 2 * 128 * 128 * constants_for(self.generation).tensor_clock.expected
        return self.tensor_flops / (peak * self.expected_ns)


def estimate_cores(
    log: Log, generation: str, options: Options | None = None
) -> dict[tuple[int, int], Estimate]:
    """Time all ranks and cores of a run; they wait for each other in collectives and barriers.

    log: of any core; (rank, core) name them, as in `log.cores`. Raises as `estimate`.
    """
    options = options or Options()
    table = constants_for(generation)
    name = table.generation
    slow = replace(options, order="program", granularity="tensor")
    logs = log.cores

    def together(level: str, how: Options) -> list[Timeline]:
        values = table.at(level)
        return replay_together([Program(one, name, values, how) for one in logs.values()])

    expected, pessimistic = together("expected", options), together("high", slow)
    return {
        place: _estimate(one, name, options, line, late.total_ns)
        for (place, one), line, late in zip(logs.items(), expected, pessimistic, strict=True)
    }


def estimate(log: Log, generation: str, options: Options | None = None) -> Estimate:
    """Time a log on "gen2", "gen3" or "gen4"; ValueError for an unknown generation or opcode.

    One core, alone: a log that meets other cores raises ValueError; see `estimate_cores`.
    `options` apply to the expected time; the pessimistic one keeps only the choice of DMA queues.
    """
    options = options or Options()
    table = constants_for(generation)
    name = table.generation
    timeline = replay(Program(log, name, table.at("expected"), options))
    slow = replace(options, order="program", granularity="tensor")
    pessimistic = replay(Program(log, name, table.at("high"), slow)).total_ns
    return _estimate(log, name, options, timeline, pessimistic)


def _estimate(
    log: Log, name: str, options: Options, timeline: Timeline, pessimistic: float
) -> Estimate:
    bounds = lower_bounds(log, name, options)
    expected = timeline.total_ns
    return Estimate(
        name, bounds[busiest(bounds)], expected, max(expected, pessimistic), timeline, bounds
    )


def busiest(bounds: dict[str, float]) -> str:
    """The resource with the most work; of equals the last by name."""
    return max(bounds, key=lambda name: (bounds[name], name))


def lower_bounds(log: Log, generation: str, options: Options) -> dict[str, float]:
    """ns by resource: its work at the shortest constants, plus kernel start and end."""
    values = constants_for(generation).at("low")
    program = Program(log, generation, values, options)
    busy: dict[str, float] = {"nothing": 0.0}
    for queue, cost in zip(program.queues, program.costs, strict=True):
        if isinstance(cost, Transfer):
            busy["dma"] = busy.get("dma", 0.0) + max(
                cost.core_ns, cost.engine_ns * cost.group_share * len(cost.groups) / NUM_GROUPS
            )
            if cost.software and options.dma_queues == "direction":
                busy["descriptors"] = busy.get("descriptors", 0.0) + cost.issue_ns
        else:
            busy[queue] = busy.get(queue, 0.0) + cost.occupancy_ns
    ends = values.kernel_start + values.kernel_end
    return {name: ns + ends for name, ns in busy.items()}


def matmul_flops(program: Program) -> float:
    """Flops of all matmuls that are not transposes."""
    total = 0.0
    for record in program.log:
        if record.opcode in ("nc_matmul", "nc_matmul_mx") and not record.flags & flags.TRANSPOSE:
            stationary = record.sources[0]
            rows, columns = stationary.shape[0], 1
            for count in stationary.shape[1:]:
                columns *= count
            total += 2.0 * rows * columns * record.elements
    return total
