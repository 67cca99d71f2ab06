"""VectorE with a value carried along the free dims: tensor_tensor_scan, tensor_scalar_cumulative.

Scans run in fp32 in element order, one value per partition. Tensor indirection is not
implemented.

Source: nki.isa.tensor_tensor_scan, nki.isa.tensor_scalar_cumulative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import in_psum, operator, per_partition
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current

from .accumulator import begin
from .enums import reduce_cmd as commands
from .issue import NkiInstruction, issue
from .stages import arithmetic, read, write

_SCAN = documented(
    "scan.operands",
    "nki.isa.tensor_tensor_scan",
    "operators are arithmetic; data0 and data1 are not both in PSUM",
)
_CUMULATIVE = documented(
    "tensor_scalar_cumulative.operands",
    "nki.isa.tensor_scalar_cumulative",
    "op0 is arithmetic, op1 is add, subtract, multiply, max or min; no 32-bit integers; "
    "imm1 only with load_reduce; reduce_cmd is reset_reduce, reduce or load_reduce",
)
_ORDERS = ("add", "subtract", "multiply", "max", "maximum", "min", "minimum")
_INT32 = (dtypes.int32, dtypes.uint32)
_COMMANDS = (commands.reset_reduce, commands.reduce, commands.load_reduce)


def tensor_tensor_scan(
    dst: Any,
    data0: Any,
    data1: Any,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """r[i] = (data0[i] op0 r[i-1]) op1 data1[i], r[-1] = initial."""
    instr = "nki.isa.tensor_tensor_scan"
    run = current(instr)
    a, b = read(instr, run, "data0", data0), read(instr, run, "data1", data1)
    ops = (operator(instr, "op0", op0, "binary"), operator(instr, "op1", op1, "binary"))
    if any(op.bitvec for op in ops) or (in_psum(data0) and in_psum(data1)):
        fail(_SCAN, instr, f"op0={op0}, op1={op1}", data0=data0, data1=data1)
    state = per_partition(instr, "initial", initial, data0)
    result = None
    if run.values:
        partitions = data0.shape[0]
        if type(state) is float:
            state = np.full(partitions, state, np.float32)
        first, second = ops[0].binary, ops[1].binary
        assert first is not None, "operator() has checked the role"
        assert second is not None, "operator() has checked the role"
        rows, other = _steps(a, partitions), _steps(b, partitions)

        def step(i: int, carried: Any) -> Any:
            inner = first(carried, rows[i]) if reverse0 else first(rows[i], carried)
            return second(other[i], inner) if reverse1 else second(inner, other[i])

        result, _ = _scan(rows, state.reshape(-1), step)
    write(instr, run, dst, result, data0=data0, data1=data1)
    tiles = (data0, data1, initial)
    return issue(run, "tensor_tensor_scan", "vector", dst, tiles, data0, detail=op0.name, name=name)


def _steps(values: Any, partitions: int) -> Any:
    """[steps, partitions], contiguous, so that each step is one row."""
    return np.ascontiguousarray(values.reshape(partitions, -1).T)


def _scan(rows: Any, state: Any, step: Callable[[int, Any], Any]) -> tuple[Any, Any]:
    """[partitions, steps] of states, and the last one."""
    result = np.empty_like(rows)
    for i in range(len(rows)):
        result[i] = state = step(i, state)
    return result.T, state


def tensor_scalar_cumulative(
    dst: Any,
    src: Any,
    op0: Any,
    op1: Any,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: Any = commands.reset_reduce,
    name: str | None = None,
) -> NkiInstruction:
    """r = (src[i] op0 imm0) op1 r; dst[i] = r, r kept in the reduce registers."""
    instr = "nki.isa.tensor_scalar_cumulative"
    run = current(instr)
    values = read(instr, run, "src", src)
    second = operator(instr, "op1", op1, "binary")
    function = second.binary
    assert function is not None, "operator() has checked the role"
    legal = not getattr(op0, "bitvec", True) and second.name in _ORDERS
    legal = legal and reduce_cmd in _COMMANDS
    legal = legal and (imm1 is not None) is (reduce_cmd is commands.load_reduce)
    if not legal or src.dtype in _INT32 or dst.dtype in _INT32:
        fail(_CUMULATIVE, instr, f"{op0}, {op1}, {reduce_cmd}, imm1={imm1}", dst=dst, src=src)
    lanes = begin(instr, run, src, op1, reduce_cmd, imm1)[: src.shape[0], 0]
    inner = arithmetic(instr, "0", values, op0, imm0, False, src)
    result = None
    if run.values:
        rows = _steps(inner, src.shape[0])
        result, last = _scan(rows, lanes.copy(), lambda i, carried: function(rows[i], carried))
        lanes[...] = last
    write(instr, run, dst, result, src=src)
    tiles = (src, imm0, imm1)
    return issue(
        run, "tensor_scalar_cumulative", "vector", dst, tiles, src, detail=op0.name, name=name
    )
