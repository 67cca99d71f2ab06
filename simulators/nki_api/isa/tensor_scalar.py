"""One tile and broadcast operands: tensor_scalar and tensor_scalar_reduce.

The reduction keeps its running values in VectorE's registers: accumulator.py. Tensor indirection
is not implemented.

Source: nki.isa.tensor_scalar, nki.isa.tensor_scalar_reduce.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import destination, in_psum, like, same_tiles, source
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current

from .accumulator import reduce_lanes
from .copy import ENGINE
from .enums import engine as engines
from .enums import reduce_cmd as commands
from .issue import NkiInstruction, issue
from .stages import BITVEC, arithmetic, bitwise, check_bitvec, present, read, write

_SCALARS = documented(
    "tensor_scalar.operands",
    "nki.isa.tensor_scalar",
    "operands are float32 numbers or [P, 1] tiles; op1 and operand1 come together",
)
_ON_SCALAR = documented(
    "tensor_scalar.scalar_engine",
    "nki.isa.tensor_scalar",
    "ScalarE (from gen3) runs multiply+add, multiply or add only",
)
_NEWER = documented(
    "tensor_scalar.op",
    "nki.isa.tensor_scalar; NKI release notes 0.4.0",
    "square and relu need gen4",
)
_REDUCE = documented(
    "tensor_scalar_reduce.operators",
    "nki.isa.tensor_scalar_reduce",
    "op0 is arithmetic and not reversed",
)
_REDUCTIONS = ("add", "multiply", "max", "maximum", "min", "minimum")
_COMMANDS = (commands.reset_reduce, commands.reduce, commands.load_reduce)
_GEN4 = ("square", "relu")


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
) -> NkiInstruction:
    """dst = (data op0 operand0) op1 operand1, operands broadcast along the free dims."""
    instr = "nki.isa.tensor_scalar"
    run = current(instr)
    values = present(run, source(instr, "data", data))
    if op1 is None and operand1 is not None:
        fail(_SCALARS, instr, "operand1 without op1", operand1=operand1)
    if engine is not engines.unknown:
        _check_engine(instr, run, engine, op0, op1, dst, data)
    _check_generation(instr, run, op0, op1, data)
    operands = (op0, operand0, reverse0, op1, operand1, reverse1)
    if any(type(op) is Op and op.bitvec for op in (op0, op1)):
        _bit_steps(instr, run, dst, data, values, operands)
    else:
        values = dtypes.to_f32(values, data.dtype)
        values = arithmetic(instr, "0", values, op0, operand0, reverse0, data)
        if op1 is not None:
            into = values if run.values else None
            values = arithmetic(instr, "1", values, op1, operand1, reverse1, data, into=into)
        write(instr, run, dst, values, data=data)
    unit = "vector" if engine is engines.unknown else engine.name
    tiles = (data, operand0, operand1)
    return issue(run, "tensor_scalar", unit, dst, tiles, data, detail=op0.name, name=name)


def _bit_steps(instr: str, run: Run, dst: Any, data: Any, values: Any, operands: Any) -> None:
    op0, operand0, reverse0, op1, operand1, reverse1 = operands
    if not all(op is None or (type(op) is Op and op.bitvec) for op in (op0, op1)):
        fail(BITVEC, instr, f"op0={op0}, op1={op1}", data=data)
    check_bitvec(instr, dst, data)
    values = bitwise(instr, "0", values, op0, operand0, reverse0, data)
    if op1 is not None:
        values = bitwise(instr, "1", values, op1, operand1, reverse1, data)
    out = destination(instr, "dst", dst)
    same_tiles(instr, dst=dst, data=data)
    if run.values:
        out[...] = like(values, out.shape).astype(out.dtype)


def _check_generation(instr: str, run: Run, op0: Any, op1: Any, data: Any) -> None:
    if run.chip.number < 4 and any(getattr(op, "name", "") in _GEN4 for op in (op0, op1)):
        fail(_NEWER, instr, f"op0={op0}, op1={op1} on {run.chip.generation}", data=data)


def _check_engine(
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
            fail(ENGINE, instr, f"GpSimdE runs rsqrt in SBUF only, got {op0}", **operands)
    elif engine is not engines.vector:
        fail(ENGINE, instr, f"{engine} cannot run it", **operands)


def tensor_scalar_reduce(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: Any = None,
    reverse0: bool = False,
    reduce_cmd: Any = commands.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """dst = data op0 operand0, and its reduction over all free dims."""
    instr = "nki.isa.tensor_scalar_reduce"
    run = current(instr)
    if reverse0 or getattr(op0, "bitvec", True):
        fail(_REDUCE, instr, f"op0={op0}, reverse0={reverse0}", data=data)
    _check_generation(instr, run, op0, None, data)
    values = read(instr, run, "data", data)
    values = arithmetic(instr, "0", values, op0, operand0, False, data)
    write(instr, run, dst, values, data=data)
    reduce_lanes(
        instr,
        run,
        data,
        values,
        reduce_op,
        _REDUCTIONS,
        reduce_cmd,
        _COMMANDS,
        reduce_res,
        reduce_init,
        reduce_res_negate,
    )
    flags = READ_ACCUMULATOR if reduce_res is not None else 0
    tiles = (data, operand0, reduce_res)
    return issue(
        run, "tensor_scalar_reduce", "vector", dst, tiles, data, flags, op0.name, name=name
    )
