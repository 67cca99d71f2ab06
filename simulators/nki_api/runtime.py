"""The state of one kernel run, in a context variable: chip, core, parameters, log.

N threads can simulate at once, each with its own run. Does not run anything: see jit.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import chips, errors, memory
from .log import BufferInfo, Log

_SPACES = ("hbm", "sbuf", "psum")


@dataclass(frozen=True, kw_only=True)
class SimParams:
    """How to simulate.

    strict: rules of the inferred tier raise instead of warning.
    log: keep an instruction log even outside `record`, which is how to read one.
    values: False for shape-only mode: every check that needs no values, the whole log, and no
        arithmetic; outputs then have their shape and dtype, filled with the unwritten mark.
    """

    strict: bool = False
    log: bool = False
    values: bool = True


class Run:
    """One kernel call. `accumulators` are the engines' reduce registers, [128, 1] fp32 each."""

    __slots__ = (
        "accumulators",
        "chip",
        "core",
        "issued",
        "log",
        "loops",
        "num_buffers",
        "num_programs",
        "ordered",
        "params",
        "program_id",
        "random",
        "values",
    )

    def __init__(
        self, chip: chips.Chip, core: memory.Core, params: SimParams, log: Log | None
    ) -> None:
        self.chip = chip
        self.core = core
        self.params = params
        self.values = core.values = params.values
        self.log = log
        self.program_id = 0
        self.num_programs = 1
        self.accumulators: dict[str, Any] = {}
        self.num_buffers = 0
        self.issued = 0  # instructions so far
        self.loops: tuple[int, ...] = ()  # device loops that are open, outermost first
        self.random: dict[str, Any] = {}  # generator state of each engine
        self.ordered = False  # inside nl.no_reorder

    def next_number(self) -> int:
        """A number for a new buffer, its index in the log's buffer table."""
        if self.log is not None:
            return len(self.log.buffers)
        self.num_buffers += 1
        return self.num_buffers

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
            )
        )


_RUN: ContextVar[Run | None] = ContextVar("nki_simulator_run", default=None)
_RECORDER: ContextVar[Log | None] = ContextVar("nki_simulator_recorder", default=None)
_PARAMS: ContextVar[SimParams | None] = ContextVar("nki_simulator_params", default=None)
_POOL = memory.CorePool()


def current(what: str) -> Run:
    """The run in progress; RuntimeError when `what` is used outside a kernel."""
    run = _RUN.get()
    if run is None:
        raise RuntimeError(f"{what} works inside a kernel only; call the @nki.jit function")
    return run


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


@contextmanager
def parameters(params: SimParams) -> Iterator[None]:
    """Use `params` for every kernel called in this block."""
    token = _PARAMS.set(params)
    try:
        yield
    finally:
        _PARAMS.reset(token)


@contextmanager
def running(generation: str) -> Iterator[Run]:
    """A fresh run on an empty core. Kernels may not be nested."""
    params = _PARAMS.get() or SimParams()
    log = _RECORDER.get()
    if log is None and params.log:
        log = Log()
    chip = chips.chip_for(generation)
    core = _POOL.borrow(chip)
    run = Run(chip, core, params, log)
    tokens = (_RUN.set(run), errors.STRICT.set(params.strict))
    try:
        with np.errstate(all="ignore"):
            yield run
    finally:
        _RUN.reset(tokens[0])
        errors.STRICT.reset(tokens[1])
        _POOL.give_back(core)
