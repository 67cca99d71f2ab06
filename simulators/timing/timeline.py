"""When everything happened on one core, and what every start waited for. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from .program import Program


@dataclass
class Timeline:
    """When everything happened, in ns from the kernel's start. Lists are indexed by record.

    start: the engine takes the instruction. free: the engine or queue may take the next one.
    end: the result may be used (a DMA: data landed). wait_kind and wait_on: what `start` waited
    for; kinds are start, engine, data, war, waw, bank, space, window, loop, port, generator,
    meeting (the other cores of a collective or barrier; no record of this core).
    transfer: (first byte, last byte) of DMAs. cold: matmuls at half clock. table_load: ns of
    exposed function table loads of ScalarE. meetings: records that waited for other cores, with the
    moment from which they did, and the kind and record that they had waited for until then.
    """

    program: Program
    start: list[float]
    free: list[float]
    end: list[float]
    wait_kind: list[str]
    wait_on: list[int]
    ready: list[float]
    transfer: dict[int, tuple[float, float]] = field(default_factory=dict)
    cold: set[int] = field(default_factory=set)
    table_load: dict[int, float] = field(default_factory=dict)
    meetings: dict[int, tuple[float, str, int]] = field(default_factory=dict)
    total_ns: float = 0.0
    resource_busy: dict[str, float] = field(default_factory=dict)
