"""Registers of the engines' sequencers: allocate, move, load, store.

`while reg:` follows the documented parser front end; int(reg), range(reg) and comparisons raise, as
under the tracer. In shape-only mode a register loaded from memory has no value. Loops: loops.py.

Source: nki.isa.register_alloc and its neighbours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import broken, deprecated, fail, unsupported
from .front_end import check_condition
from .initmap import OTHER
from .memory import PSUM
from .rules import documented, inferred
from .runtime import current

_REGISTER = documented(
    "register.operands",
    "nki.isa.register_alloc, register_move, register_load, register_store",
    "a register holds a written 32-bit integer; memory operands have one element in HBM or SBUF",
)
_READ_ONLY = documented(
    "register.loop_variable",
    "NKI release notes 0.4.0; NKI migration guide (Rules for migrated loops)",
    "the variable of a device loop is never written",
)
_GEN2 = inferred(
    "register_store.gen2",
    "compiler error NCC_IXCG832, as reported by users of trn1",
    "register_store does not work on gen2",
)


_ARITHMETIC = inferred(
    "register.arithmetic",
    "compiler errors for mod and mul, in aws-neuron/nki-library@d2ad3a5, test_collectives.py",
    "no Python arithmetic on registers, although nki.collectives speaks of it; look the result up "
    "in a table by scalar_offset",
)
_ENDLESS = inferred(
    "loop.endless",
    "nki.language.while_loop; NKI language guide, Dynamic loops; the count is this simulator's",
    "the body of a while loop writes its condition, and it ends within 1,000,000 iterations",
)

MAX_ITERATIONS = 1_000_000


def check_turn(instr: str, turns: int, written: bool) -> None:
    """Refuse one more turn of a while loop that does not end."""
    if not written:
        fail(_ENDLESS, instr, "the body did not write the condition, which is not zero")
    if turns > MAX_ITERATIONS:
        fail(_ENDLESS, instr, f"iteration number {turns:,}")


class Register:
    """A virtual register: an integer known on the device only, None before it is written."""

    __slots__ = ("read_only", "turns", "unknown", "value", "written")

    def __init__(self, value: int | None = None, *, read_only: bool = False) -> None:
        self.value = value
        self.read_only = read_only  # the variable of a device loop
        self.unknown = False  # loaded in shape-only mode
        self.written = True  # since it was last a condition
        self.turns = 0  # of the `while` that it is the condition of

    def __bool__(self) -> bool:
        instr = "a register as a condition"
        check_condition(instr)
        if self.turns == 0:
            deprecated("`while register` is deprecated since NKI 0.6; use nl.while_loop")
        if read(instr, self) == 0:
            self.turns = 0
            return False
        self.turns += 1
        check_turn(instr, self.turns, self.written)
        self.written = False
        return True

    def __eq__(self, other: object) -> bool:
        if type(other) is Register or isinstance(other, (int, np.integer)):
            raise TypeError("a register's value is not known while a kernel is built")
        return False

    __hash__ = object.__hash__

    def __int__(self) -> int:
        raise TypeError("a register's value is not known while a kernel is built")

    __index__ = __int__

    def __repr__(self) -> str:
        return f"<register {self.value}>"

    def _calculate(self, other: Any, function: Callable[[int, int], int]) -> Register:
        broken(_ARITHMETIC, "arithmetic on a register", f"{self!r} and {other!r}")
        result = Register()
        result.unknown = self.unknown or getattr(other, "unknown", False)
        if not result.unknown:
            instr = "arithmetic on a register"
            result.value = function(read(instr, self), read(instr, other))
        return result

    def __add__(self, other: Any) -> Register:
        return self._calculate(other, operator.add)

    def __sub__(self, other: Any) -> Register:
        return self._calculate(other, operator.sub)

    def __mul__(self, other: Any) -> Register:
        return self._calculate(other, operator.mul)

    def __mod__(self, other: Any) -> Register:
        return self._calculate(other, operator.mod)

    __radd__, __rmul__ = __add__, __mul__


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
    _writable("nki.isa.register_move", dst)
    dst.value, dst.unknown = read("nki.isa.register_move", src), False
    dst.written = True


def _writable(instr: str, dst: Any) -> None:
    if type(dst) is not Register:
        fail(_REGISTER, instr, f"{dst!r} is no register")
    if dst.read_only:
        fail(_READ_ONLY, instr, "dst is the variable of a device loop")


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
    _writable(instr, dst)
    values = _scalar(instr, src)
    check_written(instr, "src", src)
    if src.storage.watch is not None:
        src.storage.watch.read(run.place.core, instr, src)
    dst.value, dst.unknown = (int(values.reshape(-1)[0]), False) if run.values else (None, True)
    dst.written = True
    if run.log is not None:
        run.log.add("register_load", "all", None, (src,), 1)


def register_store(dst: Any, src: Register) -> None:
    """The one element of dst = src."""
    from .checks import mark

    instr = "nki.isa.register_store"
    run = current(instr)
    if run.chip.number == 2:
        broken(_GEN2, instr, "on gen2", dst=dst)
    out = _scalar(instr, dst)
    if dst.storage.watch is not None:
        dst.storage.watch.write(run.place.core, instr, dst, None, run.values)
    mark(dst, OTHER)
    if run.values:
        out[...] = np.array(read(instr, src), np.int64).astype(out.dtype)
    if run.log is not None:
        run.log.add("register_store", "all", dst, (), 1)
