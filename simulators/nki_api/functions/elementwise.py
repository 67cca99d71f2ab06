"""nki.language operators called on tiles: one and two operands, where, rounding, trigonometry.

VectorE runs two operands, ScalarE functions. Rounding goes through int32, as the device has no
instruction for it: |x| must stay below 2^31. sin and cos reduce their argument first, to fp32
accuracy for |x| up to 10^4.

Source: nki.language (add, exp, where, floor, sin, ...); nki.api.shared (note on sin).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes, isa
from nxd_cp.simulators.nki_api.allocation import ndarray
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.memory import PSUM
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .common import KNOWN_ISSUE, NOT_ON_DEVICE, both_widened, check_tiles, result
from .movement import copy
from .reductions import reduce

_RSQRT = documented(
    "language.rsqrt", "NKI release notes 0.5.0", "nl.rsqrt runs on GpSimdE: its input is in SBUF"
)
_TURN = 2 * math.pi
_TURN_HIGH = float(np.float32(6.28125))  # few bits, so that k * _TURN_HIGH is exact
_TURN_LOW = _TURN - _TURN_HIGH


def apply(op: Op, *args: Any, **kwargs: Any) -> NkiTensor:
    """nl.<operator>(...) on tiles: elementwise, or a reduction for max and min."""
    special = _SPECIAL.get(op.name)
    if special is not None:
        return special(*args, **kwargs)
    if op.name in ("max", "min"):
        return reduce(op, *args, **kwargs)
    if op.name == "copy":
        return copy(*args, **kwargs)
    if op.binary is not None or op.name in ("fmod", "mod"):
        return binary(op, *args, **kwargs)
    return unary(op, *args, **kwargs)


def unary(op: Op, x: Any, dtype: Any = None) -> NkiTensor:
    """One function of every element."""
    tile = result(op.name, getattr(x, "shape", ()), dtype, x)
    if op is OPS["reciprocal"]:
        isa.reciprocal(tile, x)
    elif op.activate is not None:
        isa.activation(tile, op, x)
    else:
        isa.tensor_scalar(tile, x, op, None)
    return tile


def binary(op: Op, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """Two tiles, or a tile and a number, element by element."""
    name = f"nki.language.{op.name}"
    if op.name in ("fmod", "mod"):
        fail(NOT_ON_DEVICE, name, "no such instruction", x=x, y=y)
    tiles = [value for value in (x, y) if isinstance(value, NkiTensor)]
    if op.name == "power" and len(tiles) < 2:
        broken(KNOWN_ISSUE, name, "not supported on the device", x=x, y=y)
    if len(tiles) < 2:
        data = tiles[0] if tiles else x
        tile = result(op.name, getattr(data, "shape", ()), dtype, data)
        isa.tensor_scalar(tile, data, op, y if data is x else x, reverse0=data is not x)
        return tile
    check_tiles(op.name, x, y)
    x, y = both_widened(op.name, x, y)
    tile = result(op.name, x.shape, dtype, x, y)
    isa.tensor_tensor(tile, x, y, op)
    return tile


def negative(x: Any, dtype: Any = None) -> NkiTensor:
    """-x."""
    return binary(OPS["multiply"], x, -1.0, dtype)


def logical_not(x: Any, dtype: Any = None) -> NkiTensor:
    """x XOR 1, for x of 0 and 1."""
    return binary(OPS["logical_xor"], x, 1.0, dtype)


def _rsqrt(x: Any, dtype: Any = None) -> NkiTensor:
    """1 / sqrt(x) on GpSimdE."""
    tile = result("rsqrt", getattr(x, "shape", ()), dtype, x)
    if x.space == PSUM:
        fail(_RSQRT, "nki.language.rsqrt", "x is in PSUM; use nisa.activation", x=x)
    isa.tensor_scalar(tile, x, OPS["rsqrt"], 0.0, engine=isa.engine.gpsimd)
    return tile


def where(condition: Any, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """x where condition is not 0, else y; x and y are tiles or numbers."""
    tiles = [value for value in (x, y) if isinstance(value, NkiTensor)]
    first = tiles[0] if tiles else condition
    tile = result("where", condition.shape, dtype or first.dtype, condition, *tiles)
    mask = ndarray(condition.shape, dtypes.uint8)
    isa.tensor_scalar(mask, condition, OPS["not_equal"], 0.0)
    for value, reverse in ((y, True), (x, False)):
        if isinstance(value, NkiTensor) and value.dtype is not tile.dtype:
            value = copy(value, tile.dtype)
        isa.tensor_copy_predicated(tile, value, mask, reverse_pred=reverse)
    return tile


def _rounded(x: Any) -> NkiTensor:
    """x to the nearest integer, ties to even, as float32."""
    whole = copy(x, dtypes.int32)
    return copy(whole, dtypes.float32)


def _corrected(name: str, x: Any, dtype: Any, comparison: str, op: str) -> NkiTensor:
    """The nearest integer, moved by one where it lies on the wrong side of x."""
    nearest = _rounded(x)
    wide = copy(x, dtypes.float32)
    tile = result(name, x.shape, dtype or x.dtype, nearest)
    isa.tensor_tensor(wide, nearest, wide, OPS[comparison])
    isa.tensor_tensor(tile, nearest, wide, OPS[op])
    return tile


def floor(x: Any, dtype: Any = None) -> NkiTensor:
    """The largest integer not above x."""
    return _corrected("floor", x, dtype, "greater", "subtract")


def ceil(x: Any, dtype: Any = None) -> NkiTensor:
    """The smallest integer not below x."""
    return _corrected("ceil", x, dtype, "less", "add")


def trunc(x: Any, dtype: Any = None) -> NkiTensor:
    """x without its fraction."""
    sign, size = unary(OPS["sign"], x, dtypes.float32), unary(OPS["abs"], x, dtypes.float32)
    return binary(OPS["multiply"], floor(size), sign, dtype or x.dtype)


def _sine(name: str, x: Any, shift: float, dtype: Any) -> NkiTensor:
    """sin(x + shift), the argument brought into [-pi, pi] first."""
    tile = result(name, getattr(x, "shape", ()), dtype, x)
    wide = ndarray(x.shape, dtypes.float32)
    isa.tensor_scalar(wide, x, OPS["add"], shift)
    turns = _rounded(binary(OPS["multiply"], wide, 1 / _TURN))
    for part in (_TURN_HIGH, _TURN_LOW):
        isa.scalar_tensor_tensor(wide, turns, OPS["multiply"], -part, OPS["add"], wide)
    limit = math.nextafter(float(np.float32(math.pi)), 0.0)
    isa.tensor_scalar(wide, wide, OPS["minimum"], limit, op1=OPS["maximum"], operand1=-limit)
    isa.activation(tile, OPS["sin"], wide)
    return tile


def sin(x: Any, dtype: Any = None) -> NkiTensor:
    """The sine of any x."""
    return _sine("sin", x, 0.0, dtype)


def cos(x: Any, dtype: Any = None) -> NkiTensor:
    """The cosine of any x."""
    return _sine("cos", x, math.pi / 2, dtype)


def tan(x: Any, dtype: Any = None) -> NkiTensor:
    """sin(x) / cos(x)."""
    below = unary(OPS["reciprocal"], _sine("tan", x, math.pi / 2, dtypes.float32))
    return binary(OPS["multiply"], _sine("tan", x, 0.0, dtypes.float32), below, dtype or x.dtype)


_SPECIAL = {"rsqrt": _rsqrt, "sin": sin}
