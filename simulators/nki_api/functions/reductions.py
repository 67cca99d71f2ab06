"""nki.language reductions over the last free dims, and what is made of them.

sum, prod, max, min, all, mean, var, softmax, rms_norm. Means, variances and norms are computed in
float32.

Source: nki.language (sum, mean, var, softmax, rms_norm, ...).
"""

from __future__ import annotations

import math
import operator
from typing import Any

from nxd_cp.simulators.nki_api import dtypes, isa
from nxd_cp.simulators.nki_api.allocation import ndarray
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .common import check_tiles, result, widened

_AXIS = documented(
    "language.axis",
    "nki.language.sum, max",
    "axes are the last free dims of the tile, never dim 0",
)


def _axes(name: str, x: Any, axis: Any) -> tuple[int, ...]:
    """`axis` as the last dims, ascending."""
    check_tiles(name, x)
    axes = [axis] if isinstance(axis, int) else list(axis)
    wanted = sorted(operator.index(a) % x.ndim for a in axes)
    if not wanted or wanted[0] == 0 or wanted != list(range(x.ndim - len(wanted), x.ndim)):
        fail(_AXIS, f"nki.language.{name}", f"axis={axis} of {x.ndim} dims", x=x)
    return tuple(wanted)


def reduce(op: Op, x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Reduce the last free dims. One free dim of size 1 stays where none would be left."""
    wanted = _axes(op.name, x, axis)
    rest = x.shape[: wanted[0]]
    shape = rest if len(rest) > 1 else (*rest, 1)
    if keepdims:
        shape = (*rest, *(1 for _ in wanted))
    tile = result(op.name, shape, dtype, x)
    isa.tensor_reduce(tile, op, x, wanted)
    return tile


def sum(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Sum over the last free dims."""
    return reduce(OPS["add"], x, axis, dtype, keepdims)


def prod(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Product over the last free dims."""
    return reduce(OPS["multiply"], x, axis, dtype, keepdims)


def all(x: Any, axis: Any, dtype: Any = None) -> NkiTensor:
    """1 where no element of the last free dims is 0."""
    return reduce(OPS["logical_and"], x, axis, dtype)


def mean(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Mean over the last free dims."""
    axes = _axes("mean", x, axis)
    total = sum(x, axis, dtypes.float32, keepdims)
    tile = result("mean", total.shape, dtype or x.dtype, total)
    isa.tensor_scalar(tile, total, OPS["multiply"], 1 / math.prod(x.shape[a] for a in axes))
    return tile


def _with(x: NkiTensor, small: NkiTensor, op: str, dtype: Any = dtypes.float32) -> NkiTensor:
    """x op small, small repeated along x's free dims."""
    tile = ndarray(x.shape, dtype)
    isa.tensor_tensor(tile, x, widened(op, small, x.shape), OPS[op])
    return tile


def var(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Variance over the last free dims, which stay with size 1 whatever keepdims says."""
    apart = _with(x, mean(x, axis, dtypes.float32, keepdims=True), "subtract")
    isa.tensor_tensor(apart, apart, apart, OPS["multiply"])
    return mean(apart, axis, dtype or x.dtype, keepdims=True)


def softmax(x: Any, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """exp(x - max) / sum(exp(x - max)) over the last free dims."""
    apart = _with(x, reduce(OPS["max"], x, axis, dtypes.float32, keepdims=True), "subtract")
    isa.activation(apart, OPS["exp"], apart)
    total = sum(apart, axis, keepdims=True)
    isa.reciprocal(total, total)
    return _with(apart, total, "multiply", dtype or x.dtype)


def rms_norm(
    x: Any,
    w: Any,
    axis: Any,
    n: int,
    epsilon: float = 1e-6,
    dtype: Any = None,
    compute_dtype: Any = None,
) -> NkiTensor:
    """x / sqrt(sum(x * x) / n + epsilon) * w, the steps in compute_dtype (float32)."""
    inner = compute_dtype or dtypes.float32
    squares = ndarray(x.shape, inner)
    isa.activation(squares, OPS["square"], x)
    scale = sum(squares, axis, keepdims=True)
    add, multiply = OPS["add"], OPS["multiply"]
    isa.tensor_scalar(scale, scale, multiply, 1.0 / n, op1=add, operand1=epsilon)
    isa.activation(scale, OPS["rsqrt"], scale)
    normed = _with(x, scale, "multiply", inner)
    return _with(normed, w, "multiply", dtype or x.dtype)
