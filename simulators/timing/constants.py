"""Constants of the cost model: three values, a unit, a tag and a source each.

Does: hold one named table per chip generation and resolve it to plain numbers at one level.
Does not: compute any cost (cost.py) or hold the numbers themselves (gen2.py, gen3.py, gen4.py).

Levels: "low" is the value that gives the shortest time, "high" the longest, "expected" the one to
plan with. Tags: documented (a vendor page states it), measured (somebody timed it on a chip),
derived (arithmetic on the former two, or a fit to them), guess (nothing better was found).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, get_args

Level = Literal["low", "expected", "high"]
Tag = Literal["documented", "measured", "derived", "guess"]
LEVELS: tuple[str, ...] = get_args(Level)
TAGS: tuple[str, ...] = get_args(Tag)


@dataclass(frozen=True)
class Constant:
    """One number of the model. `low` gives the shortest time, `high` the longest."""

    low: float
    expected: float
    high: float
    unit: str
    tag: Tag
    source: str

    def at(self, level: str) -> float:
        """The value at `level`."""
        return float(getattr(self, level))


def same(value: float, unit: str, tag: Tag, source: str) -> Constant:
    """A constant whose three levels agree."""
    return Constant(value, value, value, unit, tag, source)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """One generation. Every field but the first two is a Constant; gen3.py says how they read."""

    generation: str
    note: str

    tensor_clock: Constant
    tensor_sustained: Constant
    tensor_cold: Constant
    tensor_window: Constant
    tensor_window_share: Constant
    matmul_min_columns: Constant
    matmul_overhead: Constant
    matmul_latency: Constant
    matmul_fp32_passes: Constant
    transpose_fp32_passes: Constant
    transpose_background: Constant
    weights_columns_per_cycle: Constant

    vector_clock: Constant
    vector_issue: Constant
    vector_latency: Constant
    vector_pointer: Constant
    vector_min_interval: Constant

    scalar_clock: Constant
    scalar_issue: Constant
    scalar_copy_issue: Constant
    scalar_latency: Constant
    scalar_copy_latency: Constant
    scalar_min_interval: Constant
    table_load: Constant
    accumulator_read: Constant

    gpsimd_clock: Constant
    gpsimd_base: Constant
    gpsimd_cycles_per_element: Constant

    semaphore: Constant
    stride_factor: Constant

    dma_engine_rate: Constant
    dma_packet: Constant
    dma_short_rate: Constant
    dma_short_packet: Constant
    dma_packet_bytes: Constant
    dma_core_rate: Constant
    dma_software_issue: Constant
    dma_software_start: Constant
    dma_hardware_issue: Constant
    dma_hardware_start: Constant
    dma_done: Constant
    dma_transpose_share: Constant
    dma_transpose_hbm_share: Constant
    dma_compute_share: Constant

    collective_start: Constant
    collective_hop: Constant
    collective_rate: Constant
    core_barrier: Constant

    kernel_start: Constant
    kernel_end: Constant
    loop_iteration: Constant

    def items(self) -> Iterator[tuple[str, Constant]]:
        """(name, constant) in the order of this class."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Constant):
                yield field.name, value

    def tag(self, name: str) -> str:
        """The tag of a constant; parts of a cost carry the names of the constants they rest on."""
        value = getattr(self, name)
        assert isinstance(value, Constant), f"{name} is not a constant"
        return value.tag

    def at(self, level: str) -> Values:
        """All constants as plain numbers at `level`; ValueError for an unknown level."""
        if level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
        return Values({name: constant.at(level) for name, constant in self.items()})


class Values:
    """Constants at one level, as attributes: `values.vector_clock` is a float."""

    def __init__(self, numbers: dict[str, float]) -> None:
        self.__dict__.update(numbers)

    def __getattr__(self, name: str) -> float:
        raise AttributeError(f"no constant named {name!r}")


@lru_cache(maxsize=8)
def constants_for(generation: str) -> Constants:
    """The table of "gen2", "gen3" or "gen4" (also trn1, inf2, trn2, trn3).

    Raises ValueError for anything else.
    """
    from . import gen2, gen3, gen4

    tables = {"gen2": gen2.CONSTANTS, "gen3": gen3.CONSTANTS, "gen4": gen4.CONSTANTS}
    alias = {"trn1": "gen2", "inf2": "gen2", "trn2": "gen3", "trn3": "gen4"}
    name = alias.get(generation, generation)
    if name not in tables:
        known = ", ".join([*alias, *tables])
        raise ValueError(f"generation: expected one of {known}, got {generation!r}")
    return tables[name]
