"""VectorE over the free dims of one tile: tensor_reduce, bn_stats, bn_aggr.

Source: nki.isa.tensor_reduce, nki.isa.bn_stats, nki.isa.bn_aggr.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import destination, operator, source
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .issue import NkiInstruction, issue
from .stages import BITVEC, check_bitvec, read

MAX_STATS = 512

_AXIS = documented(
    "tensor_reduce.axis",
    "nki.isa.tensor_reduce",
    "axes are the last free dims, ending at the final dim, never dim 0",
)
_STATS = documented(
    "bn_stats.shape",
    "nki.isa.bn_stats, bn_aggr",
    "bn_stats takes at most 512 elements and gives 6; bn_aggr takes triples and gives 2",
)


def tensor_reduce(
    dst: Any,
    op: Any,
    data: Any,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Reduce the last free dims of data."""
    instr = "nki.isa.tensor_reduce"
    run = current(instr)
    values = source(instr, "data", data)
    reduce = operator(instr, "op", op, "reduce").reduce
    axes = reduced_axes(instr, axis, data)
    kept = data.shape[: axes[0] if type(axes) is tuple else axes]
    if op.bitvec:
        check_bitvec(instr, dst, data)
        if negate:
            fail(BITVEC, instr, "negate needs an arithmetic operator", data=data)
    if dst.shape[0] != data.shape[0] or dst.size != math.prod(kept):
        detail = f"dst has shape {dst.shape}, the reduction {kept}"
        fail(_AXIS, instr, detail, dst=dst, data=data)
    if run.values:
        wide = values if op.bitvec else dtypes.to_f32(values, data.dtype)
        result = reduce.reduce(wide, axis=axes)
        result = -result if negate else result
    out = destination(instr, "dst", dst)
    if not run.values:
        pass
    elif op.bitvec:
        out[...] = result.reshape(out.shape)
    else:
        dtypes.store_f32(out, result.reshape(out.shape), dst.dtype)
    return issue(run, "tensor_reduce", "vector", dst, (data,), data, detail=op.name, name=name)


def reduced_axes(instr: str, axis: Any, data: NkiTensor) -> Any:
    """`axis` as one non-negative axis, or a tuple of several."""
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    ndim = data.ndim
    wanted = tuple(sorted(a + ndim if a < 0 else a for a in axes))
    if not wanted or wanted != tuple(range(ndim - len(wanted), ndim)) or wanted[0] == 0:
        fail(_AXIS, instr, f"axis={axis} of {ndim} dims", data=data)
    return wanted if len(wanted) > 1 else wanted[0]


def bn_stats(dst: Any, data: Any, name: str | None = None) -> NkiInstruction:
    """dst [P, 6] = count, mean, variance * count of the even, then of the odd elements."""
    instr = "nki.isa.bn_stats"
    run = current(instr)
    values = read(instr, run, "data", data)
    elements = data.size // data.shape[0]
    out = destination(instr, "dst", dst)
    if elements > MAX_STATS or dst.shape[0] != data.shape[0] or dst.size != 6 * dst.shape[0]:
        fail(_STATS, instr, f"{elements} elements into {dst.shape}", dst=dst, data=data)
    if run.values:
        wide = values.reshape(data.shape[0], -1)
        stats = np.zeros((data.shape[0], 6), np.float32)
        for at, part in ((0, wide[:, 0::2]), (3, wide[:, 1::2])):
            count = part.shape[1]
            if count:
                mean = part.mean(axis=1, dtype=np.float32)
                stats[:, at], stats[:, at + 1] = count, mean
                stats[:, at + 2] = np.square(part - mean[:, None]).sum(axis=1)
        dtypes.store_f32(out, stats.reshape(out.shape), dst.dtype)
    return issue(run, "bn_stats", "vector", dst, (data,), data, name=name)


def bn_aggr(dst: Any, data: Any, name: str | None = None) -> NkiInstruction:
    """dst [P, 2] = mean and variance of the (count, mean, variance * count) triples in data."""
    instr = "nki.isa.bn_aggr"
    run = current(instr)
    values = read(instr, run, "data", data)
    partitions = data.shape[0]
    elements = data.size // partitions
    out = destination(instr, "dst", dst)
    if elements % 3 or dst.shape[0] != partitions or dst.size != 2 * partitions:
        fail(_STATS, instr, f"{elements} elements into {dst.shape}", dst=dst, data=data)
    if run.values:
        triples = values.reshape(partitions, -1, 3)
        count, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
        total = count.sum(axis=1)
        center = (count * mean).sum(axis=1) / total
        variance = (spread + count * np.square(mean - center[:, None])).sum(axis=1) / total
        dtypes.store_f32(out, np.stack([center, variance], 1).reshape(out.shape), dst.dtype)
    return issue(run, "bn_aggr", "vector", dst, (data,), data, name=name)
