"""Loops that run on the device, and no_reorder.

A body is run once per iteration with a read-only register as its variable. Loops over a register
that was loaded in shape-only mode raise: the count is not known.

Source: nki.language.fori_loop, while_loop, dynamic_range, no_reorder; NKI migration guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import broken, deprecated, fail
from .ranks.program import ITERATION, LOOP
from .registers import Register, check_turn, read
from .rules import documented, inferred
from .runtime import Run, current

_LOOP = documented(
    "loop.bounds",
    "nki.language.fori_loop, while_loop, dynamic_range",
    "bounds are integers or registers, the step a positive integer; a while body gives a "
    "register, a fori body nothing",
)
_ORDER = documented(
    "no_reorder.loop", "nki.language.no_reorder", "no device loop runs inside no_reorder"
)
_NESTED = inferred(
    "loop.nested",
    "NKI release notes 0.4.0 (known issues), reports by users",
    "device loops are not nested",
)


class _Loop:
    """A device loop, open inside `with`."""

    def __init__(self, instr: str, step: int) -> None:
        run = current(instr)
        if run.ordered:
            fail(_ORDER, instr, "a device loop inside no_reorder")
        if not isinstance(step, int) or step < 1:
            fail(_LOOP, instr, f"step={step}")
        if run.loops:
            broken(_NESTED, instr, f"{len(run.loops)} device loops are open here")
        self.run = run
        self.before = run.loops

    def __enter__(self) -> Run:
        self.run.issued += 1  # the branch; also what tells this loop from every other
        self.run.loops = (*self.before, self.run.issued)
        if self.run.trace is not None:
            self.run.trace.add(LOOP)
        return self.run

    def __exit__(self, *error: object) -> None:
        self.run.loops = self.before


def _iteration(run: Run) -> None:
    if run.trace is not None:
        run.trace.add(ITERATION)
    if run.log is not None:
        run.log.add("loop_iteration", "all", None, (), 0)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Register], Any], step: int = 1) -> None:
    """body_fun(register with i) for i in range(lower, upper, step), a loop on the device."""
    instr = "nki.language.fori_loop"
    with _Loop(instr, step) as run:
        for i in range(read(instr, lower), read(instr, upper), step):
            _iteration(run)
            result = body_fun(Register(i, read_only=True))
            if result is not None:
                fail(_LOOP, instr, f"the body returned {result!r}")


def while_loop(init: Register, body_fun: Callable[[Register], Register]) -> None:
    """r = init; while r is not 0: r = body_fun(r)."""
    instr = "nki.language.while_loop"
    with _Loop(instr, 1) as run:
        state: Any = init
        turns, written = 0, True
        while type(state) is Register and read(instr, state) != 0:
            turns += 1
            check_turn(instr, turns, written)
            _iteration(run)
            condition = Register(state.value)
            condition.written = False
            state = body_fun(condition)
            written = condition.written or state is not condition
        if type(state) is not Register:
            fail(_LOOP, instr, f"init or the body gave {state!r}")


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[Register]:
    """Registers with the integers of a device loop."""
    instr = "nki.language.dynamic_range"
    deprecated("nl.dynamic_range is deprecated since NKI 0.6; use nl.fori_loop")
    lower, upper = (0, start) if stop is None else (start, stop)
    bounds = read(instr, lower), read(instr, upper)
    loop = _Loop(instr, step)

    def iterations() -> Iterator[Register]:
        with loop as run:
            for i in range(*bounds, step):
                _iteration(run)
                yield Register(i, read_only=True)

    return iterations()


@contextmanager
def no_reorder() -> Iterator[None]:
    """Instructions inside keep program order, which the simulator always does."""
    run = current("nki.language.no_reorder")
    before, run.ordered = run.ordered, True
    try:
        yield
    finally:
        run.ordered = before
