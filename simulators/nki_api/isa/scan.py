"""VectorE over running values: scans, cumulative sums, tensor_scalar_reduce, batch statistics.

Scans run in fp32 in element order, one value per partition carried along the free dims.
Tensor indirection is not implemented.

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
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .accumulator import reduce_lanes
from .enums import reduce_cmd as commands
from .vector_engine import _present, _step

_SCAN = documented(
    "scan.operands",
    "nki.isa.tensor_tensor_scan",
    "operators are arithmetic; data0 and data1 are not both in PSUM",
)
_REDUCE = documented(
    "tensor_scalar_reduce.operators",
    "nki.isa.tensor_scalar_reduce",
    "op0 is arithmetic and not reversed",
)
_STATS = documented(
    "bn_stats.shape",
    "nki.isa.bn_stats, bn_aggr",
    "bn_stats takes at most 512 elements and gives 6; bn_aggr takes triples and gives 2",
)
MAX_STATS = 512


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
) -> None:
    """r[i] = (data0[i] op0 r[i-1]) op1 data1[i], r[-1] = initial."""
    instr = "nki.isa.tensor_tensor_scan"
    run = current(instr)
    a, b = source(instr, "data0", data0), source(instr, "data1", data1)
    ops = (operator(instr, "op0", op0, "binary"), operator(instr, "op1", op1, "binary"))
    if any(op.bitvec for op in ops) or (in_psum(data0) and in_psum(data1)):
        fail(_SCAN, instr, f"op0={op0}, op1={op1}", data0=data0, data1=data1)
    state = per_partition(instr, "initial", initial, data0)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data0=data0, data1=data1)
    if run.values:
        partitions = data0.shape[0]
        rows = [
            np.ascontiguousarray(dtypes.to_f32(x, t.dtype).reshape(partitions, -1).T)
            for x, t in ((a, data0), (b, data1))
        ]
        if type(state) is float:
            state = np.full(partitions, state, np.float32)
        result = _scan(rows[0], rows[1], state.reshape(-1), ops, reverse0, reverse1)
        dtypes.store_f32(out, result.T.reshape(out.shape), dst.dtype)
    if run.log is not None:
        tiles = tuple(t for t in (data0, data1, initial) if type(t) is NkiTensor)
        elements = data0.size // data0.shape[0]
        run.log.add("tensor_tensor_scan", "vector", dst, tiles, elements, detail=op0.name)


def _scan(a: Any, b: Any, state: Any, ops: Any, reverse0: bool, reverse1: bool) -> Any:
    """Rows are steps, columns partitions."""
    first, second = ops[0].binary, ops[1].binary
    result = np.empty_like(a)
    for i in range(len(a)):
        inner = first(state, a[i]) if reverse0 else first(a[i], state)
        state = second(b[i], inner) if reverse1 else second(inner, b[i])
        result[i] = state
    return result


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
) -> None:
    """dst = data op0 operand0, and its reduction over all free dims."""
    instr = "nki.isa.tensor_scalar_reduce"
    run = current(instr)
    values = source(instr, "data", data)
    if reverse0 or getattr(op0, "bitvec", True):
        fail(_REDUCE, instr, f"op0={op0}, reverse0={reverse0}", data=data)
    values = dtypes.to_f32(_present(run, values), data.dtype)
    values = _step(instr, "0", values, op0, operand0, False, data)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, data=data)
    if run.values:
        dtypes.store_f32(out, like(values, out.shape), dst.dtype)
    allowed = ("add", "multiply", "max", "maximum", "min", "minimum")
    reduce_lanes(
        instr,
        run,
        data,
        values,
        reduce_op,
        allowed,
        reduce_cmd,
        reduce_res,
        reduce_init,
        reduce_res_negate,
    )
    if run.log is not None:
        tiles = tuple(t for t in (data, operand0, reduce_res) if type(t) is NkiTensor)
        flags = READ_ACCUMULATOR if reduce_res is not None else 0
        elements = data.size // data.shape[0]
        run.log.add("tensor_scalar_reduce", "vector", dst, tiles, elements, flags, detail=op0.name)


def bn_stats(dst: Any, data: Any, name: str | None = None) -> None:
    """dst [P, 6] = count, mean, variance * count of the even, then of the odd elements."""
    instr = "nki.isa.bn_stats"
    run = current(instr)
    values = source(instr, "data", data)
    elements = data.size // data.shape[0]
    out = destination(instr, "dst", dst, OTHER)
    if elements > MAX_STATS or dst.shape[0] != data.shape[0] or dst.size != 6 * dst.shape[0]:
        fail(_STATS, instr, f"{elements} elements into {dst.shape}", dst=dst, data=data)
    if run.values:
        wide = dtypes.to_f32(values, data.dtype).reshape(data.shape[0], -1)
        stats = np.zeros((data.shape[0], 6), np.float32)
        for at, part in ((0, wide[:, 0::2]), (3, wide[:, 1::2])):
            count = part.shape[1]
            if count:
                mean = part.mean(axis=1, dtype=np.float32)
                stats[:, at], stats[:, at + 1] = count, mean
                stats[:, at + 2] = np.square(part - mean[:, None]).sum(axis=1)
        dtypes.store_f32(out, stats.reshape(out.shape), dst.dtype)
    if run.log is not None:
        run.log.add("bn_stats", "vector", dst, (data,), elements)


def bn_aggr(dst: Any, data: Any, name: str | None = None) -> None:
    """dst [P, 2] = mean and variance of the (count, mean, variance * count) triples in data."""
    instr = "nki.isa.bn_aggr"
    run = current(instr)
    values = source(instr, "data", data)
    partitions = data.shape[0]
    elements = data.size // partitions
    out = destination(instr, "dst", dst, OTHER)
    if elements % 3 or dst.shape[0] != partitions or dst.size != 2 * partitions:
        fail(_STATS, instr, f"{elements} elements into {dst.shape}", dst=dst, data=data)
    if run.values:
        triples = dtypes.to_f32(values, data.dtype).reshape(partitions, -1, 3)
        count, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
        total = count.sum(axis=1)
        center = (count * mean).sum(axis=1) / total
        variance = (spread + count * np.square(mean - center[:, None])).sum(axis=1) / total
        dtypes.store_f32(out, np.stack([center, variance], 1).reshape(out.shape), dst.dtype)
    if run.log is not None:
        run.log.add("bn_aggr", "vector", dst, (data,), elements)
