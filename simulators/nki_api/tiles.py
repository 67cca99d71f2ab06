"""nki.language functions on tiles: each allocates its result and issues nki.isa instructions.

Elementwise operators and reductions give SBUF tiles of the input's dtype unless told otherwise;
matmul and transpose give PSUM tiles, as documented. Which engine the vendor's compiler picks is
not documented, so the log's engine is our choice: VectorE for two operands, ScalarE for functions.

Source: nki.language (load, store, add, exp, sum, matmul, transpose, ...).
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from . import dtypes, isa
from .allocation import ndarray, psum
from .errors import fail, unsupported
from .initmap import OTHER
from .memory import HBM, MemoryRegion, hbm_storage
from .ops import OPS, Op
from .rules import documented
from .runtime import current
from .tensor import NkiTensor, row_major

_TILE = documented(
    "language.tile",
    "nki.language (parameters of each function)",
    "operands are on-chip tiles (one of two may be a number) of one shape, up to free dims of "
    "size 1",
)
_LOAD = documented(
    "language.load", "nki.language.load, store", "load reads HBM, store writes HBM from SBUF"
)
_AXIS = documented(
    "language.axis",
    "nki.language.sum, max",
    "axes are the last free dims of the tile, never dim 0",
)


def load(src: Any, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the values of an HBM tensor."""
    if type(src) is not NkiTensor or src.space != HBM:
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
    if type(dst) is not NkiTensor or dst.space != HBM or type(value) is not NkiTensor:
        fail(_LOAD, "nki.language.store", "dst is not in HBM or value no tile", dst=dst)
    isa.dma_copy(dst, value)


def copy(x: Any, dtype: Any = None) -> NkiTensor:
    """A copy of a tile in SBUF."""
    tile = _result("copy", x.shape, dtype, x)
    isa.tensor_copy(tile, x)
    return tile


def _result(name: str, shape: tuple[int, ...], dtype: Any, *tiles: Any) -> NkiTensor:
    for tile in tiles:
        if type(tile) is not NkiTensor or tile.space == HBM:
            fail(_TILE, f"nki.language.{name}", "an operand is no on-chip tile", operand=tile)
    if dtype is None and any(tile.dtype is not tiles[0].dtype for tile in tiles):
        both = " and ".join(tile.dtype for tile in tiles)
        unsupported(f"nki.language.{name} of {both}", "pass dtype=: no document gives a default")
    return ndarray(shape, dtype or tiles[0].dtype)


def apply(op: Op, *args: Any, **kwargs: Any) -> NkiTensor:
    """nl.<operator>(...) on tiles: elementwise, or a reduction for max and min."""
    if op.name in ("max", "min"):
        return reduce(op, *args, **kwargs)
    if op.name == "copy":
        return copy(*args, **kwargs)
    if op.binary is not None:
        return binary(op, *args, **kwargs)
    return unary(op, *args, **kwargs)


def unary(op: Op, x: Any, dtype: Any = None) -> NkiTensor:
    """One function of every element."""
    tile = _result(op.name, getattr(x, "shape", ()), dtype, x)
    if op is OPS["reciprocal"]:
        isa.reciprocal(tile, x)
    elif op.activate is not None:
        isa.activation(tile, op, x)
    else:
        isa.tensor_scalar(tile, x, op, None)
    return tile


def binary(op: Op, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """Two tiles, or a tile and a number, element by element."""
    tiles = [value for value in (x, y) if isinstance(value, NkiTensor)]
    if len(tiles) < 2:
        data = tiles[0] if tiles else x
        tile = _result(op.name, getattr(data, "shape", ()), dtype, data)
        isa.tensor_scalar(tile, data, op, y if data is x else x, reverse0=data is not x)
        return tile
    shape = tuple(max(sizes) for sizes in zip(x.shape, y.shape, strict=False))
    tile = _result(op.name, shape, dtype, x, y)
    isa.tensor_tensor(tile, _widened(op.name, x, shape), _widened(op.name, y, shape), op)
    return tile


def _widened(name: str, x: NkiTensor, shape: tuple[int, ...]) -> NkiTensor:
    """`x` with its free dims of size 1 repeated to `shape`, as a view."""
    pairs = list(zip(x.shape, shape, strict=False))
    legal = x.ndim == len(shape) and pairs[0][0] == pairs[0][1]
    if not legal or any(have not in (1, want) for have, want in pairs):
        fail(_TILE, f"nki.language.{name}", f"shape {x.shape} against {shape}", operand=x)
    for dim, (have, want) in enumerate(pairs):
        if have != want:
            x = x.broadcast(dim, want)
    return x


def broadcast_to(x: Any, shape: Any, dtype: Any = None) -> NkiTensor:
    """A tile with its free dims of size 1 repeated; across partitions is not implemented."""
    wanted = tuple(int(n) for n in shape)
    if x.shape == wanted and (dtype is None or dtypes.dtype_of(dtype) is x.dtype):
        return x
    if wanted[0] != x.shape[0]:
        unsupported("nki.language.broadcast_to across partitions", "use nisa.nc_stream_shuffle")
    tile = _result("broadcast_to", wanted, dtype, x)
    isa.tensor_copy(tile, _widened("broadcast_to", x, wanted))
    return tile


def reduce(op: Op, x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Reduce the last free dims. One free dim of size 1 stays where none would be left."""
    name = f"nki.language.{op.name}"
    axes = [axis] if isinstance(axis, int) else list(axis)
    wanted = sorted(operator.index(a) % x.ndim for a in axes)
    if not wanted or wanted[0] == 0 or wanted != list(range(x.ndim - len(wanted), x.ndim)):
        fail(_AXIS, name, f"axis={axis} of {x.ndim} dims", x=x)
    rest = x.shape[: wanted[0]]
    shape = rest if len(rest) > 1 else (*rest, 1)
    if keepdims:
        shape = (*rest, *(1 for _ in wanted))
    tile = _result(op.name, shape, dtype, x)
    isa.tensor_reduce(tile, op, x, tuple(wanted))
    return tile


def sum(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Sum over the last free dims."""
    return reduce(OPS["add"], x, axis, dtype, keepdims)


def prod(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Product over the last free dims."""
    return reduce(OPS["multiply"], x, axis, dtype, keepdims)


def negative(x: Any, dtype: Any = None) -> NkiTensor:
    """-x."""
    return binary(OPS["multiply"], x, -1.0, dtype)


def transpose(x: Any, dtype: Any = None) -> NkiTensor:
    """A 2-D tile transposed by TensorE, in PSUM."""
    if dtype is not None and dtypes.dtype_of(dtype) is not x.dtype:
        unsupported("nki.language.transpose to another dtype", "copy the result with nl.copy")
    tile = ndarray(x.shape[::-1], x.dtype, psum)
    isa.nc_transpose(tile, x)
    return tile


def matmul(x: Any, y: Any, transpose_x: bool = False) -> NkiTensor:
    """x @ y, or x.T @ y if x is given transposed; a float32 tile in PSUM."""
    stationary = x if transpose_x else copy(transpose(x))
    tile = ndarray((stationary.shape[1], y.shape[1]), dtypes.float32, psum)
    isa.nc_matmul(tile, stationary, y)
    return tile


def empty_like(x: Any, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """A new, unwritten tensor of x's shape, and of its dtype and buffer unless told."""
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x: Any, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """A new tensor of zeros of x's shape, and of its dtype and buffer unless told."""
    tile = empty_like(x, dtype, buffer, name)
    if tile.space == HBM:
        unsupported("nl.zeros_like in HBM")
    isa.memset(tile, 0)
    return tile


def shared_constant(constant: Any) -> NkiTensor:
    """A shared HBM tensor that holds a NumPy array."""
    run = current("nki.language.shared_constant")
    if not isinstance(constant, np.ndarray):
        unsupported(f"nki.language.shared_constant of {type(constant).__name__}")
    dtype = dtypes.dtype_of(constant.dtype)
    flat = np.array(constant, order="C", copy=True).reshape(-1).view(np.uint8)
    storage = hbm_storage(flat.size, dtype, MemoryRegion.shared_hbm, "constant", flat)
    storage.number = run.next_number()
    storage.init.uniform = OTHER
    if run.log is not None:
        run.describe_buffer(storage)
    shape = tuple(constant.shape) or (1,)
    return NkiTensor(storage, shape, row_major(shape), 0, dtype)
