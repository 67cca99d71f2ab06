"""The state of one core's run of a kernel, in a context variable: chip, core, parameters, log.

N threads can simulate at once, each with its own run. Does not run anything: see ranks/launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import dtypes, memory
from .core_memory import Core, CorePool
from .errors import placed, strictness
from .log import NONE, BufferInfo, Log
from .params import SimParams
from .ranks.program import Trace
from .ranks.scheduler import Place
from .ranks.world import Rank, World

_SPACES = ("hbm", "sbuf", "psum")


class Run:
    """One core's run. `accumulators` are the engines' reduce registers, [128, 1] fp32 each."""

    __slots__ = (
        "accumulators",
        "chip",
        "core",
        "issued",
        "log",
        "loops",
        "names",
        "num_buffers",
        "num_programs",
        "ordered",
        "params",
        "place",
        "program_id",
        "random",
        "trace",
        "values",
        "world",
    )

    def __init__(
        self, world: World, place: Place, core: Core, params: SimParams, log: Log | None
    ) -> None:
        self.world = world
        self.place = place
        self.chip = world.chip
        self.core = core
        self.params = params
        self.values = core.values = params.values
        self.log = log
        self.program_id = place.core
        self.num_programs = world.lnc
        self.accumulators: dict[str, Any] = {}
        self.trace = Trace(self.rank.table) if self.num_programs > 1 else None
        self.num_buffers = 0
        self.issued = 0  # instructions so far
        self.names: set[str] = set()  # of instructions, for schedules
        self.loops: tuple[int, ...] = ()  # device loops that are open, outermost first
        self.random: dict[str, Any] = {}  # generator state of each engine
        self.ordered = False  # inside nl.no_reorder

    def next_number(self) -> int:
        """A number for a new buffer, its index in the log's buffer table."""
        if self.log is not None:
            return len(self.log.buffers)
        self.num_buffers += 1
        return self.num_buffers

    @property
    def rank(self) -> Rank:
        """What this core shares with the others of its rank."""
        return self.world.ranks[self.place.rank]

    def new_hbm(
        self,
        num_bytes: int,
        dtype: dtypes.DType,
        region: memory.MemoryRegion,
        name: str,
        data: Any = None,
    ) -> memory.Storage:
        """An HBM buffer, fresh or over `data`, numbered and entered in the log."""
        scale = 1 if self.core.precise else dtypes.wide_scale(dtype)
        storage = memory.hbm_storage(num_bytes, dtype, region, name, data, scale)
        storage.number, storage.owner = self.next_number(), self.world
        storage.silent = data is None and not self.values
        if self.num_programs > 1 and region is memory.MemoryRegion.shared_hbm:
            storage.watch = self.rank.watch(num_bytes)
        if self.log is not None:
            self.describe_buffer(storage)
        return storage

    def describe_buffer(self, storage: memory.Storage) -> None:
        """Enter a new buffer in the log's table."""
        assert self.log is not None, "only called when there is a log"
        self.log.buffers.append(
            BufferInfo(
                _SPACES[storage.space],
                storage.name,
                str(storage.dtype),
                storage.partitions,
                storage.row_bytes,
                storage.first_partition,
                storage.address,
                self.place.rank,
                NONE if storage.region is memory.MemoryRegion.shared_hbm else self.place.core,
            )
        )


_RUN: ContextVar[Run | None] = ContextVar("nki_simulator_run", default=None)
_RECORDER: ContextVar[Log | None] = ContextVar("nki_simulator_recorder", default=None)
_POOL = CorePool()


def current(what: str) -> Run:
    """The run in progress; RuntimeError when `what` is used outside a kernel."""
    run = _RUN.get()
    if run is None:
        raise RuntimeError(f"{what} works inside a kernel only; call the @nki.jit function")
    return run


def note_name(what: str, name: str | None) -> None:
    """Remember the name of an instruction of the run in progress."""
    if name is not None:
        current(what).names.add(name)


def current_or_none() -> Run | None:
    """The run in progress, or None."""
    return _RUN.get()


@contextmanager
def record() -> Iterator[Log]:
    """Collect the instructions of every kernel called in this block into one Log."""
    log = Log()
    token = _RECORDER.set(log)
    try:
        yield log
    finally:
        _RECORDER.reset(token)


def recorder() -> Log | None:
    """The log of the innermost `record` block."""
    return _RECORDER.get()


@contextmanager
def running(world: World, place: Place, params: SimParams, log: Log | None) -> Iterator[Run]:
    """A fresh run on an empty core. Kernels may not be nested."""
    core = _POOL.borrow(world.chip, params.precise())
    run = Run(world, place, core, params, log)
    label = f"{place}: " if len(world.places) > 1 else ""
    token = _RUN.set(run)
    try:
        tolerated = params.tolerated()
        with strictness(params.strict, tolerated), placed(label), np.errstate(all="ignore"):
            yield run
    finally:
        _RUN.reset(token)
        _POOL.give_back(core)
