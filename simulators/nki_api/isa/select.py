"""VectorE instructions that choose: tensor_copy_predicated, select_reduce, range_select.

A predicate chooses element by element; select_reduce and range_select may reduce what they chose.
Tensor indirection is not implemented.

Source: the nki.isa page of each instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    check_tile,
    destination,
    in_psum,
    like,
    mark_where,
    operator,
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .accumulator import reduce_lanes
from .enums import reduce_cmd as commands
from .generation import need
from .issue import NkiInstruction, issue

FP32_MIN = float(np.finfo(np.float32).min)

_PREDICATE = documented(
    "select.predicate",
    "nki.isa.tensor_copy_predicated, select_reduce",
    "the predicate is of an unsigned integer type (select_reduce: 8 or 16 bits, any sign) and "
    "not in PSUM together with the tile it chooses from",
)
_TYPES = documented(
    "select.dtype",
    "nki.isa.tensor_copy_predicated, select_reduce, range_select",
    "src and dst of a predicated copy have one dtype; select_reduce takes no tfloat32 or 32-bit "
    "integers; range_select takes a float tile and float32 bounds",
)
_RANGE = documented(
    "range_select.bounds",
    "nki.isa.range_select",
    "comparisons are equal, less, less_equal, greater or greater_equal; on_false_value is the "
    "least float32; indices stay below 2^24",
)
_COMMANDS = (commands.idle, commands.reset_reduce, commands.reduce)
_COMPARISONS = ("equal", "less", "less_equal", "greater", "greater_equal")
_UNSIGNED = (dtypes.uint8, dtypes.uint16, dtypes.uint32)
_SHORT = (dtypes.int8, dtypes.uint8, dtypes.int16, dtypes.uint16)
_LONG = (dtypes.tfloat32, dtypes.int32, dtypes.uint32)
_MAXIMA = ("max", "maximum")


def tensor_copy_predicated(
    dst: Any, src: Any, predicate: Any, reverse_pred: bool = False, name: str | None = None
) -> NkiInstruction:
    """dst = src where predicate; the rest of dst stays (and stays unwritten if it was)."""
    instr = "nki.isa.tensor_copy_predicated"
    run = current(instr)
    mask = source(instr, "predicate", predicate)
    check_tile(instr, "dst", dst)
    tile = type(src) is NkiTensor
    if predicate.dtype not in _UNSIGNED or (tile and in_psum(src) and in_psum(predicate)):
        fail(_PREDICATE, instr, f"predicate is {predicate.dtype}", predicate=predicate, src=src)
    if tile:
        values = source(instr, "src", src)
        if src.dtype is not dst.dtype:
            fail(_TYPES, instr, f"src is {src.dtype}, dst {dst.dtype}", src=src, dst=dst)
        same_tiles(instr, dst=dst, src=src, predicate=predicate)
        values = like(values, dst.shape)
    else:
        same_tiles(instr, dst=dst, predicate=predicate)
        values = np.empty((1,) * dst.ndim, dst.dtype.np_dtype)
        dtypes.store_f32(values, np.full(values.shape, float(src), np.float32), dst.dtype)
    if run.values:
        chosen = like(mask, dst.shape) != 0
        chosen = ~chosen if reverse_pred else chosen
        mark_where(dst, chosen)
        np.copyto(dst.array, values, where=chosen)
    else:
        destination(instr, "dst", dst, OTHER)
    return issue(run, "tensor_copy_predicated", "vector", dst, (src, predicate), dst, name=name)


def select_reduce(
    dst: Any,
    predicate: Any,
    on_true: Any,
    on_false: Any,
    reduce_res: Any = None,
    reduce_cmd: Any = commands.idle,
    reduce_op: Any = OPS["maximum"],
    reverse_pred: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """dst = on_true where predicate, else on_false (a number or [P, 1]); may reduce by max."""
    instr = "nki.isa.select_reduce"
    run = current(instr)
    mask, values = source(instr, "predicate", predicate), source(instr, "on_true", on_true)
    if predicate.dtype not in _SHORT or (in_psum(predicate) and in_psum(on_true)):
        fail(_PREDICATE, instr, f"predicate is {predicate.dtype}", predicate=predicate)
    if on_true.dtype in _LONG:
        fail(_TYPES, instr, f"on_true is {on_true.dtype}", on_true=on_true)
    same_tiles(instr, on_true=on_true, predicate=predicate)
    other = per_partition(instr, "on_false", on_false, on_true)
    result = None
    if run.values:
        chosen = (mask == 0) if reverse_pred else (mask != 0)
        wide = dtypes.to_f32(values, on_true.dtype)
        result = np.where(like(chosen, wide.shape), wide, _fp32(other))
    _finish(instr, run, dst, on_true, result, reduce_op, reduce_cmd, _COMMANDS, reduce_res)
    flags = READ_ACCUMULATOR if reduce_res is not None else 0
    tiles = (predicate, on_true, on_false, reduce_res)
    return issue(run, "select_reduce", "vector", dst, tiles, dst, flags, "maximum", name)


def range_select(
    dst: Any,
    on_true_tile: Any,
    comp_op0: Any,
    comp_op1: Any,
    bound0: Any,
    bound1: Any,
    reduce_cmd: Any = commands.reset_reduce,
    reduce_res: Any = None,
    reduce_op: Any = OPS["maximum"],
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> NkiInstruction:
    """dst = on_true_tile where both comparisons of (range_start + index) hold, else FP32_MIN."""
    instr = "nki.isa.range_select"
    run = current(instr)
    need(run, instr, 3)
    values = source(instr, "on_true_tile", on_true_tile)
    bounds = [
        per_partition(instr, role, bound, on_true_tile)
        for role, bound in (("bound0", bound0), ("bound1", bound1))
    ]
    for bound in (bound0, bound1):
        if type(bound) is not NkiTensor or bound.dtype is not dtypes.float32:
            fail(_TYPES, instr, "a bound is no float32 tile", bound=bound)
    if on_true_tile.dtype.kind != "f":
        fail(_TYPES, instr, f"on_true_tile is {on_true_tile.dtype}", on_true_tile=on_true_tile)
    ops = [operator(instr, "comp_op", op, "binary") for op in (comp_op0, comp_op1)]
    count = on_true_tile.size // on_true_tile.shape[0]
    legal = all(op.name in _COMPARISONS for op in ops) and abs(range_start) + count <= 2**24
    if not legal or np.float32(on_false_value) != np.float32(FP32_MIN):
        detail = f"{ops}, range_start={range_start}, on_false_value={on_false_value}"
        fail(_RANGE, instr, detail, on_true_tile=on_true_tile)
    result = None
    if run.values:
        index = np.arange(count, dtype=np.float32) + np.float32(range_start)
        index = index.reshape(on_true_tile.shape[1:])
        first, second = ops[0].binary, ops[1].binary
        assert first is not None, "operator() has checked the role"
        assert second is not None, "operator() has checked the role"
        keep = np.logical_and(first(index, bounds[0]), second(index, bounds[1]))
        result = np.where(keep, dtypes.to_f32(values, on_true_tile.dtype), np.float32(FP32_MIN))
    _finish(
        instr, run, dst, on_true_tile, result, reduce_op, reduce_cmd, tuple(commands), reduce_res
    )
    flags = READ_ACCUMULATOR if reduce_res is not None else 0
    tiles = (on_true_tile, bound0, bound1, reduce_res)
    return issue(run, "range_select", "vector", dst, tiles, dst, flags, ops[0].name, name)


def _fp32(value: Any) -> Any:
    return np.float32(value) if type(value) is float else value


def _finish(
    instr: str,
    run: Run,
    dst: Any,
    data: Any,
    result: Any,
    op: Any,
    command: Any,
    known: tuple[commands, ...],
    reduce_res: Any,
) -> None:
    """Write the selection, then reduce it."""
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data)
    if run.values:
        dtypes.store_f32(out, like(result, out.shape), dst.dtype)
    reduce_lanes(instr, run, data, result, op, _MAXIMA, command, known, reduce_res)
