"""Data between lanes: nc_stream_shuffle (VectorE), gathers and partition reduction (GpSimdE).

An index outside the data raises: no document says what the device does then.

Source: the nki.isa page of each instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    check_tile,
    copied,
    destination,
    in_sbuf,
    mark,
    mark_moved,
    operator,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .issue import NkiInstruction, issue

QUADRANT = 32
KEEP = 255
GROUP = 16  # partitions of one GpSimd core

_SHUFFLE = documented(
    "nc_stream_shuffle.operands",
    "nki.isa.nc_stream_shuffle",
    "src and dst have one dtype and equal elements per partition; the mask holds 32 partitions of "
    "src's quadrant, or 255",
)
_START = documented(
    "nc_stream_shuffle.partition_start",
    "nki.isa.nc_stream_shuffle",
    "both start at 0 for 96 or 128 active partitions, at 0 or 64 for 64, else at a multiple of 32",
)
_GATHER = documented(
    "gather.operands",
    "nki.isa.nc_n_gather, local_gather",
    "dst has data's dtype and one element per index (local_gather: num_elem_per_idx, one of 1, 2, "
    "4, 8, 16, 32); indices are uint32 (local_gather: uint16, at most 4096 per core, partitions a "
    "multiple of 16)",
)
_INDEX = documented(
    "gather.index", "nki.isa.nc_n_gather, local_gather", "every index lies inside the data"
)
_PARTITION_REDUCE = documented(
    "tensor_partition_reduce.operands",
    "nki.isa.tensor_partition_reduce",
    "op is add, average, max, bitwise_or or bitwise_and; dst has one partition",
)
_PADDING = inferred(
    "nc_stream_shuffle.uninitialised",
    "nki.language guide, Creating Tensors; nki-library@d2ad3a5 (find_nonzero_indices.py)",
    "a shuffle moves memory that was written; what was not stays unwritten where it arrives",
)


def nc_stream_shuffle(
    dst: Any, src: Any, shuffle_mask: Any, name: str | None = None
) -> NkiInstruction:
    """Within each 32 partitions, dst[i] = src[shuffle_mask[i]]; 255 leaves dst[i] as it is."""
    instr = "nki.isa.nc_stream_shuffle"
    run = current(instr)
    values, written = copied(instr, "src", src, _PADDING)
    check_tile(instr, "dst", dst)
    lanes = [int(lane) for lane in shuffle_mask]
    legal = len(lanes) == QUADRANT and all(0 <= n < QUADRANT or n == KEEP for n in lanes)
    same = dst.dtype is src.dtype and dst.size // dst.shape[0] == src.size // src.shape[0]
    if not legal or not same:
        fail(_SHUFFLE, instr, f"shuffle_mask={lanes}", dst=dst, src=src)
    active = -(-max(dst.shape[0], src.shape[0]) // QUADRANT)
    step = QUADRANT if active == 1 else 64 if active == 2 else 128
    if dst.partition_start % step or src.partition_start % step:
        fail(_START, instr, f"{active * QUADRANT} active partitions", dst=dst, src=src)
    pairs = [
        (i, i // QUADRANT * QUADRANT + lanes[i % QUADRANT])
        for i in range(dst.shape[0])
        if lanes[i % QUADRANT] != KEEP
    ]
    if any(row >= src.shape[0] for _, row in pairs):
        fail(_SHUFFLE, instr, f"shuffle_mask={lanes} reads past src", dst=dst, src=src)
    taken = np.array([row for _, row in pairs], np.intp)
    moved = values.reshape(src.shape[0], -1)[taken] if run.values else None
    if written is not None:
        for i, row in pairs:
            mark_moved(dst[i : i + 1], written[row])
    elif len(pairs) == dst.shape[0]:
        mark(dst, OTHER)
    else:
        for i, _ in pairs:
            mark(dst[i : i + 1], OTHER)
    if moved is not None:
        dst.array[[i for i, _ in pairs]] = moved.reshape(-1, *dst.shape[1:])
    return issue(run, "nc_stream_shuffle", "vector", dst, (src,), src, name=name)


def nc_n_gather(dst: Any, data: Any, indices: Any, name: str | None = None) -> NkiInstruction:
    """dst[p, i] = data[p, indices[p, i]], free dims flattened."""
    instr = "nki.isa.nc_n_gather"
    run = current(instr)
    values, index = source(instr, "data", data), source(instr, "indices", indices)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst, data=data, indices=indices)
    partitions = data.shape[0]
    equal = partitions == indices.shape[0] == dst.shape[0] and dst.size == indices.size
    if not equal or dst.dtype is not data.dtype or indices.dtype is not dtypes.uint32:
        fail(_GATHER, instr, f"indices are {indices.dtype}", dst=dst, data=data, indices=indices)
    out = destination(instr, "dst", dst, OTHER)
    if run.values:
        flat = index.reshape(partitions, -1).astype(np.int64)
        _inside(instr, flat, data, 1)
        taken = np.take_along_axis(values.reshape(partitions, -1), flat, axis=1)
        out[...] = taken.reshape(out.shape)
    return issue(run, "nc_n_gather", "gpsimd", dst, (data, indices), dst, name=name)


def _inside(instr: str, index: Any, data: NkiTensor, width: int) -> None:
    elements = data.size // data.shape[0]
    if index.size and int(index.max()) + width > elements:
        fail(_INDEX, instr, f"index {int(index.max())} of {elements} elements", data=data)


def local_gather(
    dst: Any,
    src_buffer: Any,
    index: Any,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """Each 16 partitions gather by their own indices, read partition by partition first."""
    instr = "nki.isa.local_gather"
    run = current(instr)
    values, offsets = source(instr, "src_buffer", src_buffer), source(instr, "index", index)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst, src_buffer=src_buffer, index=index)
    partitions, width = src_buffer.shape[0], num_elem_per_idx
    per_core = index.size // max(partitions // GROUP, 1)
    valid = per_core if num_valid_indices is None else num_valid_indices
    legal = index.dtype is dtypes.uint16 and dst.dtype is src_buffer.dtype
    legal = legal and partitions == index.shape[0] == dst.shape[0] and partitions % GROUP == 0
    legal = legal and width in (1, 2, 4, 8, 16, 32) and 0 < valid <= min(per_core, 4096)
    if not legal or dst.size != partitions * valid * width:
        fail(_GATHER, instr, f"{valid} indices per core", dst=dst, src=src_buffer, index=index)
    out = destination(instr, "dst", dst, OTHER)
    if run.values:
        wide = values.reshape(partitions, -1)
        result = np.empty((partitions, valid * width), wide.dtype)
        for first in range(0, partitions, GROUP):
            rows = slice(first, first + GROUP)
            flat = offsets[rows].reshape(GROUP, -1).T.reshape(-1)[:valid].astype(np.int64)
            _inside(instr, flat, src_buffer, width)
            columns = (flat[:, None] + np.arange(width)).reshape(-1)
            result[rows] = wide[rows][:, columns]
        out[...] = result.reshape(out.shape)
    return issue(run, "local_gather", "gpsimd", dst, (src_buffer, index), valid * width, name=name)


def tensor_partition_reduce(
    dst: Any, op: Any, data: Any, name: str | None = None
) -> NkiInstruction:
    """dst [1, ...] = data reduced over partitions, in fp32 (bitvec: on bits)."""
    instr = "nki.isa.tensor_partition_reduce"
    run = current(instr)
    values = source(instr, "data", data)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst, data=data)
    mean = op is OPS["average"]
    known = "add" if mean else operator(instr, "op", op, "reduce").name
    legal = known in ("add", "max", "maximum", "bitwise_or", "bitwise_and")
    if op.bitvec and (data.dtype.kind not in "iu" or dst.dtype is not data.dtype):
        legal = False
    if not legal or dst.shape[0] != 1 or dst.size * data.shape[0] != data.size:
        fail(_PARTITION_REDUCE, instr, f"op={op}", dst=dst, data=data)
    out = destination(instr, "dst", dst, OTHER)
    if run.values:
        if op.bitvec:
            out[...] = op.reduce.reduce(values, axis=0).reshape(out.shape)
        else:
            function = np.add if mean else op.reduce
            result = function.reduce(dtypes.to_f32(values, data.dtype), axis=0)
            if mean:
                result /= np.float32(data.shape[0])
            dtypes.store_f32(out, result.reshape(out.shape), dst.dtype)
    return issue(
        run, "tensor_partition_reduce", "gpsimd", dst, (data,), data, detail=op.name, name=name
    )
