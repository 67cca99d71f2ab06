"""Registers of the engines' sequencers, and the loops that they steer.

`while reg:` and nl.dynamic_range follow the documented parser front end; int(reg) and range(reg)
raise, as under the tracer. In shape-only mode a register loaded from memory has no value: loops
over it raise.

Source: nki.isa.register_alloc and its neighbours; nki.language.fori_loop, while_loop, no_reorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .errors import fail, unsupported
from .initmap import OTHER
from .memory import PSUM
from .rules import documented
from .runtime import Run, current

_REGISTER = documented(
    "register.operands",
    "nki.isa.register_alloc, register_move, register_load, register_store",
    "a register holds a written 32-bit integer; memory operands have one element in HBM or SBUF",
)
_LOOP = documented(
    "loop.bounds",
    "nki.language.fori_loop, while_loop, dynamic_range",
    "bounds are integers or registers, the step a positive integer, a while body gives a register",
)
_ORDER = documented(
    "no_reorder.loop", "nki.language.no_reorder", "no device loop runs inside no_reorder"
)


class Register:
    """A virtual register: an integer known on the device only, None before it is written."""

    __slots__ = ("unknown", "value")

    def __init__(self, value: int | None = None) -> None:
        self.value = value
        self.unknown = False  # loaded in shape-only mode

    def __bool__(self) -> bool:
        return read("a register as a condition", self) != 0

    def __int__(self) -> int:
        raise TypeError("a register's value is not known while a kernel is built")

    __index__ = __int__


def read(instr: str, value: Any) -> int:
    """The value of a register or an integer."""
    if type(value) is not Register:
        if not isinstance(value, (int, np.integer)):
            fail(_REGISTER, instr, f"{value!r} is no integer and no register")
        return int(value)
    if value.unknown:
        unsupported(f"{instr} over a loaded register in shape-only mode")
    if value.value is None:
        fail(_REGISTER, instr, "the register was never written")
    return value.value


def register_alloc(x: int | None = None) -> Register:
    """A new register, with an integer in it or unwritten."""
    current("nki.isa.register_alloc")
    return Register(None if x is None else read("nki.isa.register_alloc", x))


def register_move(dst: Register, src: Any) -> None:
    """dst = an integer or another register."""
    current("nki.isa.register_move")
    dst.value, dst.unknown = read("nki.isa.register_move", src), False


def _scalar(instr: str, tensor: Any) -> Any:
    """The one element of a tensor in HBM or SBUF, as an array."""
    legal = getattr(tensor, "space", PSUM) != PSUM and tensor.size == 1
    if not legal or tensor.dtype.kind not in "iu":
        fail(_REGISTER, instr, "the memory operand", tensor=tensor)
    return tensor.array


def register_load(dst: Register, src: Any) -> None:
    """dst = the one element of src."""
    from .checks import check_written

    instr = "nki.isa.register_load"
    run = current(instr)
    values = _scalar(instr, src)
    check_written(instr, "src", src)
    dst.value, dst.unknown = (int(values.reshape(-1)[0]), False) if run.values else (None, True)
    if run.log is not None:
        run.log.add("register_load", "all", None, (src,), 1)


def register_store(dst: Any, src: Register) -> None:
    """The one element of dst = src."""
    from .checks import mark

    instr = "nki.isa.register_store"
    run = current(instr)
    out = _scalar(instr, dst)
    mark(dst, OTHER)
    if run.values:
        out[...] = np.array(read(instr, src), np.int64).astype(out.dtype)
    if run.log is not None:
        run.log.add("register_store", "all", dst, (), 1)


def _start(instr: str, step: int) -> Run:
    run = current(instr)
    if run.ordered:
        fail(_ORDER, instr, "a device loop inside no_reorder")
    if not isinstance(step, int) or step < 1:
        fail(_LOOP, instr, f"step={step}")
    return run


def _iteration(run: Run) -> None:
    if run.log is not None:
        run.log.add("loop_iteration", "all", None, (), 0, depth=3)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Register], Any], step: int = 1) -> None:
    """body_fun(register with i) for i in range(lower, upper, step), a loop on the device."""
    instr = "nki.language.fori_loop"
    run = _start(instr, step)
    for i in range(read(instr, lower), read(instr, upper), step):
        _iteration(run)
        body_fun(Register(i))


def while_loop(init: Register, body_fun: Callable[[Register], Register]) -> None:
    """r = init; while r is not 0: r = body_fun(r)."""
    instr = "nki.language.while_loop"
    run = _start(instr, 1)
    state: Any = init
    while type(state) is Register and read(instr, state) != 0:
        _iteration(run)
        state = body_fun(Register(state.value))
    if type(state) is not Register:
        fail(_LOOP, instr, f"init or the body gave {state!r}")


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[int]:
    """The integers of a device loop."""
    instr = "nki.language.dynamic_range"
    run = _start(instr, step)
    bounds = (0, read(instr, start)) if stop is None else (read(instr, start), read(instr, stop))

    def iterations() -> Iterator[int]:
        for i in range(*bounds, step):
            if run.log is not None:
                run.log.add("loop_iteration", "all", None, (), 0)
            yield i

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
