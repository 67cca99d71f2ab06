"""Two tiles, element by element: tensor_tensor, scalar_tensor_tensor; and reciprocal.

32-bit integer tensor_tensor runs exactly, on GpSimdE, unless an operand is in PSUM. Tensor
indirection is not implemented.

Source: the nki.isa page of each instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    destination,
    in_psum,
    like,
    operator,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.memory import PSUM
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current

from .copy import ENGINE
from .enums import engine as engines
from .issue import NkiInstruction, issue
from .stages import BITVEC, arithmetic, check_bitvec, read, write

_BOTH_PSUM = documented(
    "vector.inputs_in_psum",
    "nki.isa.tensor_tensor, scalar_tensor_tensor",
    "the two tensor inputs are not both in PSUM",
)
_INT32 = frozenset((dtypes.int32, dtypes.uint32))


def tensor_tensor(
    dst: Any,
    data1: Any,
    data2: Any,
    op: Any,
    engine: Any = engines.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """dst = data1 op data2, element by element."""
    instr = "nki.isa.tensor_tensor"
    run = current(instr)
    function = operator(instr, "op", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    a, b = source(instr, "data1", data1), source(instr, "data2", data2)
    psum = data1.space == PSUM or data2.space == PSUM or in_psum(dst)
    if data1.space == PSUM and data2.space == PSUM:
        fail(_BOTH_PSUM, instr, "data1 and data2 are both in PSUM", data1=data1, data2=data2)
    unit = _engine(instr, op, engine, psum, dst, data1, data2)
    out = destination(instr, "dst", dst)
    same_tiles(instr, dst=dst, data1=data1, data2=data2)
    if op.bitvec:
        check_bitvec(instr, dst, data1, data2)
    if run.values:
        a, b = like(a, out.shape), like(b, out.shape)
        if op.bitvec:
            out[...] = function(a, b)
        elif unit == "gpsimd" and _integers(dst, data1, data2) and op is not OPS["power"]:
            _store_exact(out, function(a.astype(np.int64), b.astype(np.int64)), dst.dtype)
        else:
            _apply(function, a, b, out, dst, data1, data2)
    return issue(run, "tensor_tensor", unit, dst, (data1, data2), data1, detail=op.name, name=name)


def _engine(instr: str, op: Op, engine: Any, psum: bool, dst: Any, data1: Any, data2: Any) -> str:
    """Which engine runs it: power and exact 32-bit integers on GpSimdE, else VectorE."""
    power = op is OPS["power"]
    if engine not in (engines.unknown, engines.vector, engines.gpsimd) or (
        (power or engine is engines.gpsimd) and psum
    ):
        why = "GpSimdE cannot reach PSUM" if psum else "it runs on vector or gpsimd"
        fail(ENGINE, instr, f"engine={engine}, op={op}: {why}", dst=dst, data1=data1, data2=data2)
    exact = not op.bitvec and _integers(dst, data1, data2) and not psum
    if power or engine is engines.gpsimd or (engine is engines.unknown and exact):
        return "gpsimd"
    return "vector"


def _integers(*tiles: Any) -> bool:
    return all(tile.dtype in _INT32 for tile in tiles)


def _store_exact(out: Any, values: Any, dtype: dtypes.DType) -> None:
    info = np.iinfo(dtype.np_dtype)
    out[...] = np.clip(values, info.min, info.max).astype(dtype.np_dtype)


def _apply(function: Any, a: Any, b: Any, out: Any, dst: Any, one: Any, two: Any) -> None:
    """function(a, b) in fp32, straight into `out` when that is float32."""
    a, b = dtypes.to_f32(a, one.dtype), dtypes.to_f32(b, two.dtype)
    if dst.dtype is dtypes.float32:
        function(a, b, out=out)
    else:
        dtypes.store_f32(out, function(a, b), dst.dtype)


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
) -> NkiInstruction:
    """dst = (data op0 operand0) op1 operand1, operand0 broadcast, operand1 a tile."""
    instr = "nki.isa.scalar_tensor_tensor"
    run = current(instr)
    values, other = read(instr, run, "data", data), read(instr, run, "operand1", operand1)
    if data.space == PSUM and operand1.space == PSUM:
        fail(_BOTH_PSUM, instr, "data and operand1 are both in PSUM", data=data, operand1=operand1)
    second = operator(instr, "op1", op1, "binary").binary
    assert second is not None, "operator() has checked the role"
    if getattr(op0, "bitvec", False) or op1.bitvec:
        fail(BITVEC, instr, "bitvec operators are not supported here", data=data)
    first = arithmetic(instr, "0", values, op0, operand0, reverse0, data, float32_only=False)
    result = None
    if run.values:
        other = like(other, first.shape)
        result = second(other, first) if reverse1 else second(first, other)
    write(instr, run, dst, result, data=data, operand1=operand1)
    tiles = (data, operand1, operand0)
    return issue(
        run, "scalar_tensor_tensor", "vector", dst, tiles, data, detail=op0.name, name=name
    )


def reciprocal(dst: Any, data: Any, name: str | None = None) -> NkiInstruction:
    """dst = 1 / data in fp32."""
    instr = "nki.isa.reciprocal"
    run = current(instr)
    values = read(instr, run, "data", data)
    write(instr, run, dst, np.reciprocal(values), data=data)
    return issue(run, "reciprocal", "vector", dst, (data,), data, name=name)
