"""ScalarE: activation and activation_reduce.

dst = op(data * scale + bias) in fp32, with an optional running sum per partition kept in the
engine's reduce registers across instructions. Functions are exact here; the device approximates
them by polynomials, and results outside the documented input range mean nothing there.

Source: nki.isa.activation, nki.isa.activation_reduce; nki.api.shared for functions and ranges.
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
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS, Op
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import reduce_cmd as commands
from .issue import NkiInstruction, issue
from .members import member

_PAGE = "nki.isa.activation"
REDUCE: dict[str, Any] = {
    "add": np.add,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "abs_max": np.maximum,
    "abs_min": np.minimum,
}
IDENTITY = {"add": 0.0, "maximum": -np.inf, "minimum": np.inf, "abs_max": 0.0, "abs_min": np.inf}
_BIAS = documented(
    "activation.bias",
    _PAGE,
    "bias is a [P, 1] tile, any dtype but tfloat32 (a constant from gen3); none "
    "with op=reciprocal on gen2",
)
_SCALE = documented("activation.scale", _PAGE, "scale is a number or a float32 [P, 1] tile")
_REDUCE = documented(
    "activation.reduce",
    _PAGE,
    "reduce_op is nl.add (activate2: also maximum, minimum, abs_max, abs_min), reduce_res holds "
    "one element per partition, and both need a reduce_cmd that fits",
)
_EMPTY = documented(
    "activation.accumulator",
    _PAGE,
    "reduce_cmd.reduce continues a reduction that reset or reset_reduce began",
)


_RANGE = inferred(
    "activation.range",
    "nki.api.shared, Supported Activation Functions",
    "arguments of log, sqrt, rsqrt, reciprocal, sin and arctan stay in the documented valid range",
)


def activation(
    dst: Any,
    op: Any,
    data: Any,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: Any = commands.idle,
    name: str | None = None,
) -> NkiInstruction:
    """dst = op(data * scale + bias); optionally sums the result over the free dims."""
    reduction = (reduce_op, reduce_res, reduce_cmd)
    return _activation("nki.isa.activation", dst, op, data, bias, scale, reduction, name)


def activation_reduce(
    dst: Any,
    op: Any,
    data: Any,
    reduce_op: Any,
    reduce_res: Any,
    bias: Any = None,
    scale: Any = 1.0,
    name: str | None = None,
) -> NkiInstruction:
    """activation with reduce_cmd=reset_reduce."""
    if reduce_res is None:
        fail(_REDUCE, "nki.isa.activation_reduce", "there is no reduce_res", data=data)
    reduction = (reduce_op, reduce_res, commands.reset_reduce)
    return _activation("nki.isa.activation_reduce", dst, op, data, bias, scale, reduction, name)


def _activation(
    instr: str,
    dst: Any,
    op: Any,
    data: Any,
    bias: Any,
    scale: Any,
    reduction: tuple[Any, Any, Any],
    name: str | None,
) -> NkiInstruction:
    run = current(instr)
    reduce_op, reduce_res, reduce_cmd = reduction
    function = operator(instr, "op", op, "activate").activate
    assert function is not None, "operator() has checked the role"
    x = source(instr, "data", data)
    factor = _scale(instr, scale, data)
    shift = _bias(instr, run, op, bias, data)
    values = None
    if run.values:
        x = dtypes.to_f32(x, data.dtype)
        values = _affine(x, factor, shift)
        if op.valid is not None:
            check_range(instr, op, values, data)
        values = function(values, out=None if values is x else values)
    if reduce_cmd is not commands.idle or reduce_op is not None or reduce_res is not None:
        reduce_into(instr, run, values, data, reduce_op, reduce_cmd)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data)
    if run.values:
        dtypes.store_f32(out, like(values, out.shape), dst.dtype)
    if reduce_res is not None:
        read_out(instr, run, reduce_res, data)
    bits = READ_ACCUMULATOR if reduce_res is not None else 0
    tiles = (data, bias, scale, reduce_res)
    return issue(run, "activation", "scalar", dst, tiles, data, bits, op.name, name)


def check_range(instr: str, op: Op, values: Any, data: NkiTensor) -> None:
    """Report arguments outside the documented range of a function."""
    low, high = op.valid or (0.0, np.inf)
    size = np.abs(values) if op.name == "reciprocal" else values
    smallest, largest = (find.reduce(size, axis=None) for find in (np.fmin, np.fmax))  # but NaN
    if smallest < low or largest > high:
        broken(
            _RANGE,
            instr,
            f"{op} of values from {smallest:g} to {largest:g}, valid are {low:g} to {high:g}",
            data=data,
        )


def _affine(x: Any, factor: Any, shift: Any) -> Any:
    """x * factor + shift, a new array, or x itself when both are neutral."""
    if type(factor) is float:
        if factor == 1.0:
            if type(shift) is float and shift == 0.0:
                return x
            return np.add(x, np.float32(shift) if type(shift) is float else shift)
        values = np.multiply(x, np.float32(factor))
    else:
        values = np.multiply(x, factor)
    if type(shift) is not float:
        values += shift
    elif shift != 0.0:
        values += np.float32(shift)
    return values


def _scale(instr: str, scale: Any, data: NkiTensor) -> Any:
    if type(scale) is float:
        return scale
    if type(scale) is NkiTensor and scale.dtype is not dtypes.float32:
        fail(_SCALE, instr, f"scale is {scale.dtype}", scale=scale)
    return per_partition(instr, "scale", scale, data)


def _bias(instr: str, run: Run, op: Any, bias: Any, data: NkiTensor) -> Any:
    if bias is None:
        return 0.0
    gen2 = not run.chip.constant_bias
    if type(bias) is not NkiTensor:
        if gen2:
            fail(_BIAS, instr, "a constant bias on gen2", bias=bias)
    elif bias.dtype is dtypes.tfloat32:
        fail(_BIAS, instr, "a tfloat32 bias", bias=bias)
    if gen2 and op is OPS["reciprocal"]:
        fail(_BIAS, instr, "a bias with op=reciprocal on gen2", bias=bias)
    return per_partition(instr, "bias", bias, data)


def reduce_into(
    instr: str,
    run: Run,
    values: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_cmd: Any,
    allowed: tuple[str, ...] = ("add",),
) -> None:
    """Update the reduce registers: [128, 1] fp32, or absent while nothing was reset."""
    sums = member(instr, commands, reduce_cmd) in (commands.reduce, commands.reset_reduce)
    name = getattr(reduce_op, "name", "add")
    unknown = name not in allowed or (sums and type(reduce_op) is not Op)
    if reduce_cmd is commands.load_reduce or unknown:
        fail(_REDUCE, instr, f"reduce_op={reduce_op}, reduce_cmd={reduce_cmd}", data=data)
    registers = run.accumulators.get("scalar")
    if reduce_cmd in (commands.reset, commands.reset_reduce):
        registers = np.full((128, 1), IDENTITY[name], np.float32)
        run.accumulators["scalar"] = registers
    elif registers is None:
        fail(_EMPTY, instr, f"reduce_cmd={reduce_cmd} before any reset", data=data)
    if sums and run.values:
        partitions = data.shape[0]
        flat = values if values.ndim == 2 else values.reshape(partitions, -1)
        flat = np.abs(flat) if name.startswith("abs_") else flat
        part = REDUCE[name].reduce(flat, axis=1, keepdims=True)
        registers[:partitions] = REDUCE[name](registers[:partitions], part)


def read_out(instr: str, run: Run, reduce_res: Any, data: NkiTensor) -> None:
    """Write the reduce registers to `reduce_res`, one element per partition."""
    out = destination(instr, "reduce_res", reduce_res, OTHER)
    partitions = data.shape[0]
    if reduce_res.shape[0] != partitions or reduce_res.size != partitions:
        fail(
            _REDUCE,
            instr,
            f"reduce_res has shape {reduce_res.shape}",
            reduce_res=reduce_res,
            data=data,
        )
    values = run.accumulators["scalar"][:partitions]
    if run.values:
        dtypes.store_f32(out, like(values, out.shape), reduce_res.dtype)
