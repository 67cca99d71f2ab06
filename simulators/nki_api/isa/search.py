"""Looking for values: max8, nc_find_index8, nc_match_replace8 (VectorE), nonzero_with_count.

Values are compared in fp32. Where vals repeats a value, find_index8 gives ascending positions to
ascending slots and match_replace8 to descending ones, as documented. The index that
match_replace8 gives for a value it does not find is not documented: all ones here.

Source: the nki.isa page of each instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import destination, in_sbuf, mark, source
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import FRESH, OTHER
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .generation import need
from .issue import NkiInstruction, issue

_EIGHT = documented(
    "search.shape",
    "nki.isa.max8, nc_find_index8, nc_match_replace8",
    "data has 8 to 16384 elements per partition, the small tiles have 8, partitions are equal, "
    "and indices are uint16 or uint32; max8 and nc_find_index8 take up to 3 dims and give 2",
)
_NONZERO = documented(
    "nonzero_with_count.operands",
    "nki.isa.nonzero_with_count",
    "src is float32 or int32 in SBUF, dst int32 in SBUF with one more element per partition",
)
_LANE = inferred(
    "nonzero_with_count.uninitialised",
    "nki.isa.nonzero_with_count (its partitions are fixed); nki-library@d2ad3a5",
    "partitions 0, 16, 32, ... of src were written; where not, dst stays unwritten as well",
)
_INDEX = (dtypes.uint16, dtypes.uint32)
GROUP = 16  # partitions of one GpSimd core


def _check(instr: str, data: NkiTensor, **small: NkiTensor) -> int:
    elements = data.size // data.shape[0]
    for role, tile in small.items():
        wrong_index = role in ("indices", "dst_idx") and tile.dtype not in _INDEX
        if tile.shape[0] != data.shape[0] or tile.size != 8 * tile.shape[0] or wrong_index:
            fail(_EIGHT, instr, f"{role} is {tile.shape} {tile.dtype}", data=data, **small)
    if not 8 <= elements <= 16384:
        fail(_EIGHT, instr, f"{elements} elements per partition", data=data)
    return elements


def _check_dims(instr: str, dst: NkiTensor, *inputs: NkiTensor) -> None:
    dims = [tile.ndim for tile in inputs]
    if dst.ndim != 2 or max(dims) > 3:
        fail(_EIGHT, instr, f"inputs of {dims} dims into {dst.ndim}", dst=dst, data=inputs[0])


def max8(dst: Any, src: Any, name: str | None = None) -> NkiInstruction:
    """dst [P, 8] = the 8 largest values of each partition, largest first."""
    instr = "nki.isa.max8"
    run = current(instr)
    values = source(instr, "src", src)
    out = destination(instr, "dst", dst, OTHER)
    elements = _check(instr, src, dst=dst)
    _check_dims(instr, dst, src)
    if run.values:
        wide = dtypes.to_f32(values, src.dtype).reshape(src.shape[0], -1)
        top = np.sort(np.partition(wide, elements - 8, axis=1)[:, -8:], axis=1)[:, ::-1]
        dtypes.store_f32(out, top.reshape(out.shape), dst.dtype)
    return issue(run, "max8", "vector", dst, (src,), elements, name=name)


def _match(data: Any, vals: Any, order: range) -> Any:
    """int64 [P, 8]: position of each value, -1 if absent; a position is taken once."""
    found = np.full(vals.shape, -1, np.int64)
    free = np.ones(data.shape, bool)
    rows = np.arange(len(data))
    for slot in order:
        hit = (data == vals[:, slot, None]) & free
        at = hit.argmax(axis=1)
        there = hit[rows, at]
        found[there, slot] = at[there]
        free[rows[there], at[there]] = False
    return found


def nc_find_index8(dst: Any, data: Any, vals: Any, name: str | None = None) -> NkiInstruction:
    """dst [P, 8] = position of each of 8 values in its partition; all ones if absent."""
    instr = "nki.isa.nc_find_index8"
    run = current(instr)
    values, wanted = source(instr, "data", data), source(instr, "vals", vals)
    out = destination(instr, "dst", dst, OTHER)
    elements = _check(instr, data, indices=dst, vals=vals)
    _check_dims(instr, dst, data, vals)
    if run.values:
        wide = dtypes.to_f32(values, data.dtype).reshape(data.shape[0], -1)
        eight = dtypes.to_f32(wanted, vals.dtype).reshape(data.shape[0], 8)
        out[...] = _match(wide, eight, range(8)).reshape(out.shape).astype(out.dtype)
    return issue(run, "nc_find_index8", "vector", dst, (data, vals), elements, name=name)


def nc_match_replace8(
    dst: Any, data: Any, vals: Any, imm: float, dst_idx: Any = None, name: str | None = None
) -> NkiInstruction:
    """dst = data with the first occurrence of each of 8 values replaced by imm."""
    instr = "nki.isa.nc_match_replace8"
    run = current(instr)
    values, wanted = source(instr, "data", data), source(instr, "vals", vals)
    small = {"vals": vals} if dst_idx is None else {"vals": vals, "dst_idx": dst_idx}
    out = destination(instr, "dst", dst, OTHER)
    index = None if dst_idx is None else destination(instr, "dst_idx", dst_idx, OTHER)
    elements = _check(instr, data, **small)
    replacement = np.float32(float(imm))
    if dst.shape[0] != data.shape[0] or dst.size != data.size:
        fail(_EIGHT, instr, f"dst is {dst.shape}", dst=dst, data=data)
    if run.values:
        wide = dtypes.to_f32(values, data.dtype).reshape(data.shape[0], -1).copy()
        eight = dtypes.to_f32(wanted, vals.dtype).reshape(data.shape[0], 8)
        found = _match(wide, eight, range(7, -1, -1))
        rows, slots = np.nonzero(found >= 0)
        wide[rows, found[rows, slots]] = replacement
        dtypes.store_f32(out, wide.reshape(out.shape), dst.dtype)
        if index is not None:
            index[...] = found.reshape(index.shape).astype(index.dtype)
    tiles = (data, vals, dst_idx)
    return issue(run, "nc_match_replace8", "vector", dst, tiles, elements, name=name)


def nonzero_with_count(
    dst: Any, src: Any, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> NkiInstruction:
    """Positions of nonzero elements, padding and their count, in partitions 0, 16, 32, ..."""
    instr = "nki.isa.nonzero_with_count"
    run = current(instr)
    need(run, instr, 3)
    in_sbuf(instr, dst=dst, src=src)
    elements = src.size // src.shape[0]
    legal = src.dtype in (dtypes.float32, dtypes.int32) and dst.dtype is dtypes.int32
    if not legal or dst.shape[0] != src.shape[0] or dst.size != (elements + 1) * dst.shape[0]:
        fail(_NONZERO, instr, f"{src.shape} into {dst.shape}", dst=dst, src=src)
    for partition in range(0, src.shape[0], GROUP):
        row, out = src[partition : partition + 1], dst[partition : partition + 1]
        if row.storage.init.fresh(row.region):
            broken(_LANE, instr, f"partition {partition} of src was never written", src=src)
            mark(out, FRESH)
            continue
        mark(out, OTHER)
        if run.values:
            at = np.flatnonzero(row.array.reshape(-1)) + index_offset
            result = np.full(elements + 1, padding_val, np.int32)
            result[: at.size], result[-1] = at, at.size
            out.array[...] = result.reshape(out.shape)
    return issue(run, "nonzero_with_count", "gpsimd", dst, (src,), elements, name=name)
