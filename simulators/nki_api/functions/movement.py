"""nki.language functions that move tiles: load, store, copy, broadcast, transpose, gather, print.

Also matmul, and `t[...] = x`.

Source: nki.language (load, store, copy, transpose, matmul, ...).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes, isa
from nxd_cp.simulators.nki_api.allocation import ndarray, psum
from nxd_cp.simulators.nki_api.checks import check_written
from nxd_cp.simulators.nki_api.errors import broken, fail, unsupported
from nxd_cp.simulators.nki_api.memory import HBM
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .common import KNOWN_ISSUE, TILE, check_tiles, result, widened

QUADRANT = 32  # partitions that nc_stream_shuffle moves among

_LOAD = documented(
    "language.load", "nki.language.load, store", "load reads HBM, store writes HBM from SBUF"
)
_PRINT = documented(
    "language.device_print",
    "nki.language.device_print",
    "the prefix is a string, the tensor is in SBUF or HBM and was written",
)


def load(src: Any, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the values of an HBM tensor."""
    if not isinstance(src, NkiTensor) or src.space != HBM:
        fail(_LOAD, "nki.language.load", "src is not in HBM", src=src)
    tile = ndarray(src.shape, dtype or src.dtype)
    isa.dma_copy(tile, src)
    return tile


def load_transpose2d(src: Any, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the transposed values of a 2-D HBM tensor."""
    if type(src) is not NkiTensor or src.space != HBM or src.ndim != 2:
        fail(_LOAD, "nki.language.load_transpose2d", "src is not a 2-D HBM tensor", src=src)
    tile = ndarray(src.shape[::-1], src.dtype)
    isa.dma_transpose(tile, src)
    return tile if dtype is None or dtypes.dtype_of(dtype) is src.dtype else copy(tile, dtype)


def store(dst: Any, value: Any) -> None:
    """Write an SBUF tile into an HBM tensor."""
    if not isinstance(dst, NkiTensor) or dst.space != HBM or not isinstance(value, NkiTensor):
        fail(_LOAD, "nki.language.store", "dst is not in HBM or value no tile", dst=dst)
    isa.dma_copy(dst, value)


def assign(dst: Any, value: Any) -> None:
    """`t[...] = x`: a DMA where HBM takes part, else a copy; a number fills on-chip memory."""
    if not isinstance(value, NkiTensor):
        isa.memset(dst, value)
    elif dst.space == HBM or value.space == HBM:
        isa.dma_copy(dst, value)
    else:
        isa.tensor_copy(dst, value)


def copy(x: Any, dtype: Any = None) -> NkiTensor:
    """A copy of a tile in SBUF."""
    tile = result("copy", getattr(x, "shape", ()), dtype, x)
    isa.tensor_copy(tile, x)
    return tile


def expand_dims(x: Any, axis: int) -> NkiTensor:
    """A view with a dim of size 1 at `axis`."""
    view: NkiTensor = x.expand_dim(axis + x.ndim + 1 if axis < 0 else axis)
    return view


def broadcast_to(x: Any, shape: Any, dtype: Any = None) -> NkiTensor:
    """A tile with its dims of size 1 repeated; across partitions 32 at a time, by VectorE."""
    wanted = tuple(int(n) for n in shape)
    if x.shape == wanted and (dtype is None or dtypes.dtype_of(dtype) is x.dtype):
        whole: NkiTensor = x
        return whole
    tile = result("broadcast_to", wanted, dtype, x)
    if wanted[0] == x.shape[0]:
        isa.tensor_copy(tile, widened("broadcast_to", x, wanted))
        return tile
    if x.shape[0] != 1:
        fail(TILE, "nki.language.broadcast_to", f"{x.shape} to {wanted}", x=x)
    row = x if x.dtype is tile.dtype else copy(x, tile.dtype)
    row = widened("broadcast_to", row, (1, *wanted[1:]))
    for first in range(0, wanted[0], QUADRANT):
        isa.nc_stream_shuffle(tile[first : min(first + QUADRANT, wanted[0])], row, [0] * QUADRANT)
    return tile


def transpose(x: Any, dtype: Any = None) -> NkiTensor:
    """A 2-D tile transposed by TensorE, in PSUM."""
    if dtype is not None and dtypes.dtype_of(dtype) is not x.dtype:
        unsupported("nki.language.transpose to another dtype", "copy the result with nl.copy")
    tile = ndarray(x.shape[::-1], x.dtype, psum)
    isa.nc_transpose(tile, x)
    return tile


def matmul(x: Any, y: Any, transpose_x: bool = False) -> NkiTensor:
    """x @ y, or x.T @ y if x is given transposed; a float32 tile in PSUM."""
    check_tiles("matmul", x, y)
    if not transpose_x:
        broken(KNOWN_ISSUE, "nki.language.matmul", "transpose_x=False", x=x, y=y)
    stationary = x if transpose_x else copy(transpose(x))
    tile = ndarray((stationary.shape[1], y.shape[1]), dtypes.float32, psum)
    isa.nc_matmul(tile, stationary, y)
    return tile


def gather_flattened(data: Any, indices: Any, axis: int = 0, dtype: Any = None) -> NkiTensor:
    """result[p, i] = data[p, indices[p, i]], free dims flattened (axis 0 only)."""
    if axis != 0:
        unsupported(f"nki.language.gather_flattened with axis={axis}")
    index = indices if indices.dtype is dtypes.uint32 else copy(indices, dtypes.uint32)
    tile = result("gather_flattened", indices.shape, None, data)
    isa.nc_n_gather(tile, data, index)
    return tile if dtype is None or dtypes.dtype_of(dtype) is tile.dtype else copy(tile, dtype)


def device_print(print_prefix: str, tensor: Any) -> None:
    """Print the prefix and the values (in shape-only mode the shape) to stdout."""
    name = "nki.language.device_print"
    run = current(name)
    on_psum = getattr(tensor, "space", None) not in (HBM, 1)
    if not isinstance(print_prefix, str) or type(tensor) is not NkiTensor or on_psum:
        fail(_PRINT, name, f"prefix {print_prefix!r}", tensor=tensor)
    check_written(name, "tensor", tensor)
    if run.values:
        values = dtypes.to_f32(tensor.array, tensor.dtype) if tensor.dtype.kind == "f" else None
        print(print_prefix, tensor.array if values is None else np.array(values))
    else:
        print(print_prefix, tensor.describe())
