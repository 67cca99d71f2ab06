"""The stages that instructions are built from: read, one ALU step, write.

Arithmetic runs in fp32 whatever the storage type and is rounded once, on the way out. Bitvec
operators work on integer bit patterns without a cast. In shape-only mode one element stands for
all in the checks, and nothing is written. Knows no instruction.

Source: nki.api.shared, Supported Math Operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    destination,
    like,
    operator,
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.ops import Op
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

BITVEC = documented(
    "vector.bitvec",
    "nki.api.shared, Supported Math Operators",
    "bitvec operators take integer inputs and outputs and do not mix with arithmetic operators",
)
_CAST = inferred(
    "vector.bitvec_width",
    "our reading of nki.isa.tensor_tensor, tensor_scalar (bit patterns without any casting)",
    "operands of a bitvec operator have one width",
)
_UNARY = documented(
    "operand.unary",
    "nki.isa.tensor_scalar",
    "a unary operator takes no operand: None or 0",
)


def present(run: Run, values: Any) -> Any:
    """`values`, or in shape-only mode one element that stands for them in the checks."""
    return values if run.values else values[(slice(0, 1),) * values.ndim]


def read(instr: str, run: Run, role: str, tensor: Any) -> Any:
    """The fp32 values of an input, checked."""
    return dtypes.to_f32(present(run, source(instr, role, tensor)), tensor.dtype)


def write(instr: str, run: Run, dst: Any, values: Any, **inputs: Any) -> None:
    """Round fp32 `values` into `dst`, which must have the size of every input."""
    out = destination(instr, "dst", dst)
    same_tiles(instr, dst=dst, **inputs)
    if run.values:
        dtypes.store_f32(out, like(values, out.shape), dst.dtype)


def check_bitvec(instr: str, *tensors: NkiTensor) -> None:
    """Every operand of a bitvec operator is of an integer type."""
    if any(t.dtype.kind not in "iub" for t in tensors):
        operands = {f"tensor{i}": t for i, t in enumerate(tensors)}
        fail(BITVEC, instr, "a bitvec operator on floats", **operands)
    if len({t.dtype.itemsize for t in tensors}) > 1:
        operands = {f"tensor{i}": t for i, t in enumerate(tensors)}
        broken(_CAST, instr, "operands of several widths", **operands)


def arithmetic(
    instr: str,
    which: str,
    values: Any,
    op: Any,
    operand: Any,
    reverse: bool,
    data: NkiTensor,
    into: Any = None,
    float32_only: bool = True,
) -> Any:
    """One fp32 stage with a broadcast operand; `into` may be overwritten."""
    if type(op) is Op and op.binary is None and op.unary is not None:
        if not (operand is None or (type(operand) in (int, float) and operand == 0)):
            fail(_UNARY, instr, f"{op} takes no operand{which}", operand=operand)
        return op.unary(values, out=into)
    function = operator(instr, f"op{which}", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    scalar = per_partition(instr, f"operand{which}", operand, data, float32_only=float32_only)
    if type(scalar) is float:
        scalar = np.float32(scalar)
    if reverse:
        return function(scalar, values, out=into)
    return function(values, scalar, out=into)


def bitwise(
    instr: str, which: str, values: Any, op: Op, operand: Any, reverse: bool, data: NkiTensor
) -> Any:
    """One stage on bit patterns with a broadcast integer operand."""
    if op.unary is not None:
        return op.unary(values)
    function = operator(instr, f"op{which}", op, "binary").binary
    assert function is not None, "operator() has checked the role"
    scalar = _bits(instr, f"operand{which}", values, operand, data)
    if op.name == "right_shift":  # logical: zeros come in from the left
        values = values.view(f"u{values.itemsize}")
        scalar = scalar.view(values.dtype)
    return function(scalar, values) if reverse else function(values, scalar)


def _bits(instr: str, role: str, values: Any, operand: Any, data: NkiTensor) -> Any:
    """The operand in the bit width of `values`."""
    if type(operand) is NkiTensor:
        check_bitvec(instr, operand)
        scalar = source(instr, role, operand)
        if operand.shape[0] != data.shape[0] or operand.size != data.shape[0]:
            fail(BITVEC, instr, f"{role} has shape {operand.shape}", operand=operand)
        if values.shape[0] != data.shape[0]:
            scalar = scalar[:1]
        return scalar.reshape((-1,) + (1,) * (values.ndim - 1)).astype(values.dtype)
    if isinstance(operand, (int, np.integer)):
        code = np.array(int(operand) & (2 ** (8 * values.itemsize) - 1), np.uint64)
        return code.astype(f"u{values.itemsize}").view(values.dtype)
    fail(BITVEC, instr, f"{role} must be an integer", operand=operand)
