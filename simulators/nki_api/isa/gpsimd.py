"""GpSimdE: iota and affine_select. It cannot reach PSUM. Their offset may be a register.

Letters: the affine value of partition p and free index (w, z, y, x) is
offset + p * channel_multiplier + sum of index * step.
Source: nki.isa.iota, nki.isa.affine_select.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    check_tile,
    destination,
    in_sbuf,
    like,
    operator,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.registers import Register, read
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .issue import NkiInstruction, issue

_PATTERN = documented(
    "affine.pattern",
    "nki.isa.iota, nki.isa.affine_select",
    "pattern is up to 4 [step, count] pairs whose counts multiply to the elements per partition",
)
_INT32 = documented(
    "affine.int32",
    "nki.isa.iota, nki.isa.affine_select",
    "offset, channel_multiplier and the numbers of pattern are integers of 32 bits",
)
_COMPARE = documented(
    "affine_select.cmp_op", "nki.isa.affine_select", "cmp_op is a comparison operator"
)
_COMPARISONS = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")


def _affine(
    pattern: tuple[tuple[int, int], ...], partitions: int, offset: int, multiplier: int
) -> Any:
    """int64 [partitions, elements] of affine values."""
    free = np.zeros(1, np.int64)
    for step, count in pattern:
        free = (free[:, None] + step * np.arange(count, dtype=np.int64)).reshape(-1)
    return offset + multiplier * np.arange(partitions, dtype=np.int64)[:, None] + free


def _int32(instr: str, value: Any, tile: NkiTensor) -> int:
    whole = int(value) if isinstance(value, (int, np.integer)) else None
    if whole is None or not -(2**31) <= whole < 2**31:
        fail(_INT32, instr, f"{value!r} is no int32", tile=tile)
    return whole


def _pairs(instr: str, pattern: Any, tile: NkiTensor) -> tuple[tuple[int, int], ...]:
    pairs = tuple((_int32(instr, s, tile), _int32(instr, c, tile)) for s, c in pattern)
    total = 1
    for _, count in pairs:
        total *= count
    if not 1 <= len(pairs) <= 4 or total != tile.size // tile.shape[0]:
        fail(_PATTERN, instr, f"pattern {pattern}", tile=tile)
    return pairs


def _offset(instr: str, offset: Any, tile: NkiTensor) -> int:
    return read(instr, offset) if type(offset) is Register else _int32(instr, offset, tile)


def iota(
    dst: Any, pattern: Any, offset: Any = 0, channel_multiplier: int = 0, name: str | None = None
) -> NkiInstruction:
    """dst = affine values, computed in int32."""
    instr = "nki.isa.iota"
    run = current(instr)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst)
    pairs = _pairs(instr, pattern, dst)
    multiplier = _int32(instr, channel_multiplier, dst)
    out = destination(instr, "dst", dst, OTHER)
    if run.values:
        values = _affine(pairs, dst.shape[0], _offset(instr, offset, dst), multiplier)
        values = values.astype(np.int32).reshape(out.shape)
        if dst.dtype.kind in "iu":
            info = np.iinfo(dst.dtype.np_dtype)
            out[...] = np.clip(values.astype(np.int64), info.min, info.max)
        else:
            dtypes.store_f32(out, values.astype(np.float32), dst.dtype)
    return issue(run, "iota", "gpsimd", dst, (), dst, name=name)


@functools.lru_cache(maxsize=256)
def _predicate(
    pairs: tuple[tuple[int, int], ...], partitions: int, offset: int, multiplier: int, cmp_op: str
) -> Any:
    found = getattr(np, cmp_op)(_affine(pairs, partitions, offset, multiplier), 0)
    found.flags.writeable = False
    return found


def affine_select(
    dst: Any,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: Any,
    on_false_value: Any,
    cmp_op: Any = OPS["equal"],
    offset: Any = 0,
    name: str | None = None,
) -> NkiInstruction:
    """dst = on_true_tile where cmp_op(affine value, 0), else on_false_value."""
    instr = "nki.isa.affine_select"
    run = current(instr)
    values = source(instr, "on_true_tile", on_true_tile)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst, on_true_tile=on_true_tile)
    if operator(instr, "cmp_op", cmp_op, "binary").name not in _COMPARISONS:
        fail(_COMPARE, instr, f"cmp_op={cmp_op}", dst=dst)
    pairs = _pairs(instr, pattern, dst)
    multiplier = _int32(instr, channel_multiplier, dst)
    otherwise = np.float32(float(on_false_value))
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, on_true_tile=on_true_tile)
    if run.values:
        first = _offset(instr, offset, dst)
        keep = like(_predicate(pairs, dst.shape[0], first, multiplier, cmp_op.name), out.shape)
        if dst.dtype is on_true_tile.dtype:  # chosen elements keep their bits
            fill = np.empty(1, out.dtype)
            dtypes.store_f32(fill, np.full(1, otherwise), dst.dtype)
            out[...] = np.where(keep, like(values, out.shape), fill)
        else:
            wide = like(dtypes.to_f32(values, on_true_tile.dtype), out.shape)
            chosen = np.where(keep, wide, otherwise)
            dtypes.store_f32(out, chosen, dst.dtype)
    return issue(
        run, "affine_select", "gpsimd", dst, (on_true_tile,), dst, detail=cmp_op.name, name=name
    )
