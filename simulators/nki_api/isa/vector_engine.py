"""VectorE (and what may also run elsewhere): copies, memset, elementwise, reduce, reciprocal.

Arithmetic runs in fp32 whatever the storage type and is rounded once, on the way out. Bitvec
operators work on integer bit patterns without a cast. 32-bit integer tensor_tensor runs exactly,
on GpSimdE, unless an operand is in PSUM. Tensor indirection is not implemented.

Source: the nki.isa page of each instruction; nki.api.shared for operators.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    destination,
    in_psum,
    like,
    operator,
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER, ZEROED
from nxd_cp.simulators.nki_api.memory import PSUM
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import engine as engines

_ENGINE = documented(
    "vector.engine",
    "nki.isa (engine parameter of each instruction)",
    "the engine named can run this instruction on this generation and memory",
)
_BOTH_PSUM = documented(
    "vector.inputs_in_psum",
    "nki.isa.tensor_tensor, scalar_tensor_tensor",
    "the two tensor inputs are not both in PSUM",
)
_BITVEC = documented(
    "vector.bitvec",
    "nki.api.shared, Supported Math Operators",
    "bitvec operators take integer inputs and outputs and do not mix with arithmetic operators",
)
_AXIS = documented(
    "tensor_reduce.axis",
    "nki.isa.tensor_reduce",
    "axes are the last free dims, ending at the final dim, never dim 0",
)
_SCALARS = documented(
    "tensor_scalar.operands",
    "nki.isa.tensor_scalar",
    "operands are float32 numbers or [P, 1] tiles; op1 and operand1 come "
    "together; a unary operator takes None or 0",
)
_ON_SCALAR = documented(
    "tensor_scalar.scalar_engine",
    "nki.isa.tensor_scalar",
    "ScalarE (from gen3) runs multiply+add, multiply or add only",
)
_FILL = documented(
    "memset.value", "nki.isa.memset", "the value of an integer memset is one that dst can hold"
)
_INT32 = frozenset((dtypes.int32, dtypes.uint32))


def tensor_copy(dst: Any, src: Any, engine: Any = engines.unknown, name: str | None = None) -> None:
    """dst = src within SBUF and PSUM; bit-exact for equal dtypes, else through fp32."""
    instr = "nki.isa.tensor_copy"
    run = current(instr)
    values = source(instr, "src", src)
    if engine is not engines.unknown:
        _check_copy_engine(instr, run, engine, dst, src)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, src=src)
    if not run.values:
        pass
    elif dst.dtype is src.dtype:
        out[...] = like(values, out.shape)
    else:
        dtypes.store_f32(out, like(dtypes.to_f32(values, src.dtype), out.shape), dst.dtype)
    if run.log is not None:
        unit = "vector" if engine is engines.unknown else engine.name
        run.log.add("tensor_copy", unit, dst, (src,), src.size // src.shape[0])


def _check_copy_engine(instr: str, run: Run, engine: Any, dst: Any, src: Any) -> None:
    legal = engine in (engines.vector, engines.scalar, engines.gpsimd)
    if engine is engines.scalar and not run.chip.scalar_engine_copy:
        fail(_ENGINE, instr, "no ScalarE copy on gen2; use nisa.activation(op=nl.copy)", src=src)
    if engine is engines.gpsimd and (in_psum(dst) or in_psum(src)):
        legal = False
    if not legal:
        fail(_ENGINE, instr, f"{engine} cannot run it", dst=dst, src=src)


def memset(dst: Any, value: Any, engine: Any = engines.unknown, name: str | None = None) -> None:
    """Fill dst with a constant."""
    instr = "nki.isa.memset"
    run = current(instr)
    if engine not in (engines.unknown, engines.vector, engines.gpsimd) or (
        engine is engines.gpsimd and in_psum(dst)
    ):
        fail(_ENGINE, instr, f"{engine} cannot run it", dst=dst)
    zeroed = value == 0 and type(dst) is NkiTensor and dst.space == PSUM
    out = destination(instr, "dst", dst, ZEROED if zeroed else OTHER)
    if dst.dtype.kind in "iu":
        info = np.iinfo(dst.dtype.np_dtype)
        if value != int(value) or not info.min <= value <= info.max:
            fail(_FILL, instr, f"{value!r} is no {dst.dtype}", dst=dst)
        if run.values:
            out[...] = int(value)
    elif run.values:
        dtypes.store_f32(out, np.full((1,) * out.ndim, value, np.float32), dst.dtype)
    if run.log is not None:
        unit = "gpsimd" if engine is engines.gpsimd else "vector"
        run.log.add("memset", unit, dst, (), dst.size // dst.shape[0])


def tensor_tensor(
    dst: Any,
    data1: Any,
    data2: Any,
    op: Any,
    engine: Any = engines.unknown,
    name: str | None = None,
) -> None:
    """dst = data1 op data2, element by element."""
    instr = "nki.isa.tensor_tensor"
    run = current(instr)
    function = operator(instr, "op", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    a, b = source(instr, "data1", data1), source(instr, "data2", data2)
    psum = data1.space == PSUM or data2.space == PSUM or in_psum(dst)
    if data1.space == PSUM and data2.space == PSUM:
        fail(_BOTH_PSUM, instr, "data1 and data2 are both in PSUM", data1=data1, data2=data2)
    unit = _tensor_tensor_engine(instr, op, engine, psum, dst, data1, data2)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data1=data1, data2=data2)
    if op.bitvec:
        _check_bitvec(instr, dst, data1, data2)
    if not run.values:
        pass
    elif op.bitvec:
        out[...] = function(like(a, out.shape), like(b, out.shape))
    elif unit == "gpsimd" and data1.dtype in _INT32 and op is not OPS["power"]:
        pair = [like(x, out.shape).astype(np.int64) for x in (a, b)]
        _store_exact(out, function(*pair), dst.dtype)
    else:
        a, b = like(a, out.shape), like(b, out.shape)
        _apply(
            function, dtypes.to_f32(a, data1.dtype), dtypes.to_f32(b, data2.dtype), out, dst.dtype
        )
    if run.log is not None:
        elements = data1.size // data1.shape[0]
        run.log.add("tensor_tensor", unit, dst, (data1, data2), elements, detail=op.name)


def _tensor_tensor_engine(
    instr: str, op: Op, engine: Any, psum: bool, dst: Any, data1: Any, data2: Any
) -> str:
    """Which engine runs it: power and exact 32-bit integers on GpSimdE, else VectorE."""
    power = op is OPS["power"]
    if engine not in (engines.unknown, engines.vector, engines.gpsimd) or (
        (power or engine is engines.gpsimd) and psum
    ):
        fail(
            _ENGINE,
            instr,
            f"engine={engine}, op={op}: GpSimdE cannot reach PSUM",
            dst=dst,
            data1=data1,
            data2=data2,
        )
    exact = not op.bitvec and all(t.dtype in _INT32 for t in (dst, data1, data2)) and not psum
    if power or engine is engines.gpsimd or (engine is engines.unknown and exact):
        return "gpsimd"
    return "vector"


def _store_exact(out: Any, values: Any, dtype: dtypes.DType) -> None:
    info = np.iinfo(dtype.np_dtype)
    out[...] = np.clip(values, info.min, info.max).astype(dtype.np_dtype)


def _apply(function: Any, a: Any, b: Any, out: Any, dtype: dtypes.DType) -> None:
    """function(a, b) in fp32, straight into `out` when that is float32."""
    if dtype is dtypes.float32:
        function(a, b, out=out)
    else:
        dtypes.store_f32(out, function(a, b), dtype)


def _check_bitvec(instr: str, *tensors: NkiTensor) -> None:
    if any(t.dtype.kind not in "iub" for t in tensors):
        fail(
            _BITVEC,
            instr,
            "a bitvec operator on floats",
            **{f"tensor{i}": t for i, t in enumerate(tensors)},
        )


def tensor_scalar(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = engines.unknown,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1, operands broadcast along the free dims."""
    instr = "nki.isa.tensor_scalar"
    run = current(instr)
    values = _present(run, source(instr, "data", data))
    if op1 is None and operand1 is not None:
        fail(_SCALARS, instr, "operand1 without op1", operand1=operand1)
    if engine is not engines.unknown:
        _check_scalar_engine(instr, run, engine, op0, op1, dst, data)
    bitvec = type(op0) is Op and op0.bitvec
    if bitvec or (type(op1) is Op and op1.bitvec):
        if not bitvec or (op1 is not None and not (type(op1) is Op and op1.bitvec)):
            fail(_BITVEC, instr, f"op0={op0}, op1={op1}", data=data)
        _check_bitvec(instr, dst, data)
        values = _bit_step(instr, "0", values, op0, operand0, reverse0, data)
        if op1 is not None:
            values = _bit_step(instr, "1", values, op1, operand1, reverse1, data)
    else:
        values = dtypes.to_f32(values, data.dtype)
        values = _step(instr, "0", values, op0, operand0, reverse0, data)
        if op1 is not None:
            into = values if run.values else None
            values = _step(instr, "1", values, op1, operand1, reverse1, data, into=into)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data)
    if not run.values:
        pass
    elif bitvec:
        out[...] = like(values, out.shape).astype(out.dtype)
    else:
        dtypes.store_f32(out, like(values, out.shape), dst.dtype)
    if run.log is not None:
        tiles = tuple(t for t in (data, operand0, operand1) if type(t) is NkiTensor)
        unit = "vector" if engine is engines.unknown else engine.name
        elements = data.size // data.shape[0]
        run.log.add("tensor_scalar", unit, dst, tiles, elements, detail=op0.name)


def _present(run: Run, values: Any) -> Any:
    """`values`, or in shape-only mode one element that stands for them in the checks."""
    return values if run.values else values[(slice(0, 1),) * values.ndim]


def _check_scalar_engine(
    instr: str, run: Run, engine: Any, op0: Any, op1: Any, dst: Any, data: Any
) -> None:
    operands = {"dst": dst, "data": data}
    if engine is engines.scalar:
        pair = (op0, op1)
        legal = ((OPS["multiply"], OPS["add"]), (OPS["multiply"], None), (OPS["add"], None))
        if not run.chip.scalar_engine_copy or (run.chip.number == 3 and pair not in legal):
            fail(_ON_SCALAR, instr, f"op0={op0}, op1={op1} on {run.chip.generation}", **operands)
    elif engine is engines.gpsimd:
        if op0 is not OPS["rsqrt"] or in_psum(dst) or in_psum(data):
            fail(_ENGINE, instr, f"GpSimdE runs rsqrt in SBUF only, got {op0}", **operands)
    elif engine is not engines.vector:
        fail(_ENGINE, instr, f"{engine} cannot run it", **operands)


def _step(
    instr: str,
    which: str,
    values: Any,
    op: Any,
    operand: Any,
    reverse: bool,
    data: NkiTensor,
    into: Any = None,
) -> Any:
    """One fp32 stage of tensor_scalar; `into` may be overwritten."""
    if type(op) is Op and op.binary is None and op.unary is not None:
        if not (operand is None or (type(operand) in (int, float) and operand == 0)):
            fail(_SCALARS, instr, f"{op} takes no operand{which}", operand=operand)
        return op.unary(values, out=into)
    function = operator(instr, f"op{which}", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    scalar = per_partition(instr, f"operand{which}", operand, data, float32_only=True)
    if type(scalar) is float:
        scalar = np.float32(scalar)
    if reverse:
        return function(scalar, values, out=into)
    return function(values, scalar, out=into)


def _bit_step(
    instr: str, which: str, values: Any, op: Op, operand: Any, reverse: bool, data: NkiTensor
) -> Any:
    if op.unary is not None:
        return op.unary(values)
    function = operator(instr, f"op{which}", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    if type(operand) is NkiTensor:
        _check_bitvec(instr, operand)
        scalar = source(instr, f"operand{which}", operand)
        if operand.shape[0] != data.shape[0] or operand.size != data.shape[0]:
            fail(_SCALARS, instr, f"operand{which} has shape {operand.shape}", operand=operand)
        scalar = scalar.reshape((-1,) + (1,) * (values.ndim - 1)).astype(values.dtype)
    elif isinstance(operand, (int, np.integer)):
        scalar = np.array(int(operand) & (2 ** (8 * values.itemsize) - 1), np.uint64)
        scalar = scalar.astype(f"u{values.itemsize}").view(values.dtype)
    else:
        fail(_BITVEC, instr, f"operand{which} must be an integer", operand=operand)
    if op is OPS["right_shift"]:
        values = values.view(f"u{values.itemsize}")
        scalar = scalar.view(values.dtype)
    return function(scalar, values) if reverse else function(values, scalar)


def scalar_tensor_tensor(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1, operand0 broadcast, operand1 a tile."""
    instr = "nki.isa.scalar_tensor_tensor"
    run = current(instr)
    values, other = source(instr, "data", data), source(instr, "operand1", operand1)
    if data.space == PSUM and operand1.space == PSUM:
        fail(_BOTH_PSUM, instr, "data and operand1 are both in PSUM", data=data, operand1=operand1)
    second = operator(instr, "op1", op1, "binary").binary
    assert second is not None, "operator() has checked the role"
    if op0.bitvec or op1.bitvec:
        fail(_BITVEC, instr, "bitvec operators are not supported here", data=data)
    values = dtypes.to_f32(_present(run, values), data.dtype)
    first = _step(instr, "0", values, op0, operand0, reverse0, data)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data, operand1=operand1)
    if run.values:
        first = like(first, out.shape)
        tile = like(dtypes.to_f32(other, operand1.dtype), out.shape)
        pair = (tile, first) if reverse1 else (first, tile)
        _apply(second, pair[0], pair[1], out, dst.dtype)
    if run.log is not None:
        tiles = (data, operand1, operand0) if type(operand0) is NkiTensor else (data, operand1)
        elements = data.size // data.shape[0]
        run.log.add("scalar_tensor_tensor", "vector", dst, tiles, elements, detail=op0.name)


def tensor_reduce(
    dst: Any,
    op: Any,
    data: Any,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """Reduce the last free dims of data."""
    instr = "nki.isa.tensor_reduce"
    run = current(instr)
    values = source(instr, "data", data)
    reduce = operator(instr, "op", op, "reduce").reduce
    axes = _reduce_axes(instr, axis, data)
    kept = data.shape[: axes[0] if type(axes) is tuple else axes]
    if op.bitvec:
        _check_bitvec(instr, dst, data)
        if negate:
            fail(_BITVEC, instr, "negate needs an arithmetic operator", data=data)
    if dst.shape[0] != data.shape[0] or dst.size != math.prod(kept):
        detail = f"dst has shape {dst.shape}, the reduction {kept}"
        fail(_AXIS, instr, detail, dst=dst, data=data)
    if run.values:
        wide = values if op.bitvec else dtypes.to_f32(values, data.dtype)
        result = reduce.reduce(wide, axis=axes)
        result = -result if negate else result
    out = destination(instr, "dst", dst, OTHER)
    if not run.values:
        pass
    elif op.bitvec:
        out[...] = result.reshape(out.shape)
    else:
        dtypes.store_f32(out, result.reshape(out.shape), dst.dtype)
    if run.log is not None:
        elements = data.size // data.shape[0]
        run.log.add("tensor_reduce", "vector", dst, (data,), elements, detail=op.name)


def _reduce_axes(instr: str, axis: Any, data: NkiTensor) -> Any:
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    ndim = data.ndim
    wanted = tuple(sorted(a + ndim if a < 0 else a for a in axes))
    if not wanted or wanted != tuple(range(ndim - len(wanted), ndim)) or wanted[0] == 0:
        fail(_AXIS, instr, f"axis={axis} of {ndim} dims", data=data)
    return wanted if len(wanted) > 1 else wanted[0]


def reciprocal(dst: Any, data: Any, name: str | None = None) -> None:
    """dst = 1 / data in fp32."""
    instr = "nki.isa.reciprocal"
    run = current(instr)
    values = source(instr, "data", data)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data)
    if run.values:
        values = dtypes.to_f32(like(values, out.shape), data.dtype)
        dtypes.store_f32(out, np.reciprocal(values), dst.dtype)
    if run.log is not None:
        run.log.add("reciprocal", "vector", dst, (data,), data.size // data.shape[0])
