"""Making tensors: ndarray, the helpers that allocate and fill, and constants.

Not here: views (tensor.py), placement (memory.py).
Source: nki.language.ndarray, zeros, ones, full, shared_identity_matrix; NkiTensor, memory regions.
"""

from __future__ import annotations

import math
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import dtypes
from .checks import destination
from .dtypes import DType
from .errors import broken, fail, unsupported
from .isa.copy import memset
from .isa.dma import dma_copy
from .log import HELPERS
from .memory import HBM, MemoryRegion, Storage
from .rules import documented, inferred
from .runtime import Run, current
from .tensor import NkiTensor, row_major

_SHAPE = documented(
    "ndarray.shape", "nki.language.ndarray", "a shape is 1 to 5 positive integers, 2 to 5 on chip"
)
_SINGLE = inferred(
    "ndarray.single",
    "NKI language guide (at least 2-D on chip); nki.isa.register_load (which has a [1] in SBUF)",
    "a single element on chip is [1, 1]",
)
_BUFFER = documented(
    "ndarray.buffer",
    "NKI migration guide",
    "buffer is one of nl.sbuf, nl.psum, nl.hbm, nl.private_hbm, nl.shared_hbm",
)

FILL_ELEMENTS = 16384  # the row that an HBM tensor is filled from

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum


def is_sbuf(buffer: Any) -> bool:
    """Whether `buffer` is SBUF."""
    return buffer is sbuf


def is_psum(buffer: Any) -> bool:
    """Whether `buffer` is PSUM."""
    return buffer is psum


def is_on_chip(buffer: Any) -> bool:
    """Whether `buffer` is SBUF or PSUM."""
    return buffer is sbuf or buffer is psum


def is_hbm(buffer: Any) -> bool:
    """Whether `buffer` is in HBM."""
    return buffer is MemoryRegion.private_hbm or buffer is MemoryRegion.shared_hbm


def ndarray(
    shape: Any,
    dtype: Any,
    buffer: Any = sbuf,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """A new, unwritten tensor. On chip it lives until the last name for it goes."""
    run = current("nki.language.ndarray")
    kind = dtype if type(dtype) is DType else dtypes.dtype_of(dtype)
    if kind.kind == "p":
        unsupported(f"tensors of the packed type nki.language.{kind}")
    sizes = _shape(shape, buffer)
    if buffer is sbuf or buffer is psum:
        number = run.next_number()
        storage = run.core.allocate(sizes, kind, buffer, name, number, address)
        if run.log is not None:
            run.describe_buffer(storage)
    else:
        storage = _hbm(run, sizes, kind, buffer, name)
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in HELPERS:
        frame = frame.f_back
    storage.made_at = (frame.f_code, frame.f_lasti)
    if storage.owner is None:
        storage.owner = run
    return NkiTensor(storage, sizes, row_major(sizes), 0, kind)


def _hbm(run: Run, sizes: tuple[int, ...], kind: DType, region: MemoryRegion, name: str) -> Storage:
    """A buffer in HBM; in shared HBM, every core of the rank gets the same one."""

    def make() -> Storage:
        return run.new_hbm(kind.itemsize * math.prod(sizes), kind, region, name)

    if region is not MemoryRegion.shared_hbm or run.num_programs == 1:
        return make()
    return run.rank.shared(run.place.core, (name, sizes, kind), make)


def _shape(shape: Any, buffer: Any) -> tuple[int, ...]:
    if type(shape) is tuple and 2 <= len(shape) <= 5 and type(buffer) is MemoryRegion:
        for size in shape:
            if type(size) is not int or size < 1:
                break
        else:
            return shape
    if not isinstance(buffer, MemoryRegion):
        fail(_BUFFER, "nki.language.ndarray", f"buffer={buffer!r}")
    try:
        sizes = tuple(operator.index(n) for n in (shape if np.iterable(shape) else (shape,)))
    except TypeError:
        fail(_SHAPE, "nki.language.ndarray", f"shape {shape} in {buffer.value}")
    if sizes == (1,) and is_on_chip(buffer):
        broken(_SINGLE, "nki.language.ndarray", f"shape {shape} in {buffer.value}")
        sizes = (1, 1)
    least = 1 if is_hbm(buffer) else 2
    if not least <= len(sizes) <= 5 or min(sizes) < 1:
        fail(_SHAPE, "nki.language.ndarray", f"shape {shape} in {buffer.value}")
    return sizes


def full(
    shape: Any, fill_value: float, dtype: Any, buffer: Any = sbuf, name: str = ""
) -> NkiTensor:
    """ndarray filled with a constant: memset on chip, DMA from a filled row in HBM."""
    tensor = ndarray(shape, dtype, buffer, name)
    if tensor.space != HBM:
        memset(tensor, fill_value)
        return tensor
    flat = tensor.reshape((tensor.size,))
    row = ndarray((1, min(tensor.size, FILL_ELEMENTS)), tensor.dtype)
    memset(row, fill_value)
    for start in range(0, tensor.size, FILL_ELEMENTS):
        piece = flat[start : min(start + FILL_ELEMENTS, tensor.size)]
        dma_copy(piece, row[:, : piece.size])
    return tensor


def zeros(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """full(0)."""
    return full(shape, 0, dtype, buffer, name)


def ones(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """full(1)."""
    return full(shape, 1, dtype, buffer, name)


def empty_like(x: Any, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """A new, unwritten tensor of x's shape, and of its dtype and buffer unless told."""
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x: Any, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    """A new tensor of zeros of x's shape, and of its dtype and buffer unless told."""
    return full(x.shape, 0, dtype or x.dtype, buffer or x.buffer, name)


def shared_constant(constant: Any, dtype: Any = None) -> NkiTensor:
    """A shared HBM tensor that holds a NumPy array, or the array in a .npy file.

    dtype: cast on the host first (a parameter of NKI 0.2).
    """
    run = current("nki.language.shared_constant")
    if isinstance(constant, (str, Path)):
        constant = np.load(constant)
    if not isinstance(constant, np.ndarray):
        unsupported(f"nki.language.shared_constant of {type(constant).__name__}")
    kind = dtypes.dtype_of(constant.dtype if dtype is None else dtype)
    wide = not run.core.precise and kind in dtypes.LOW_PRECISION
    dense = np.array(constant, np.float32 if wide else kind.np_dtype, order="C", copy=True)
    flat, num_bytes = dense.reshape(-1).view(np.uint8), dense.size * kind.itemsize
    storage = run.new_hbm(num_bytes, kind, MemoryRegion.shared_hbm, "constant", flat)
    shape = tuple(constant.shape) or (1,)
    return NkiTensor(storage, shape, row_major(shape), 0, kind)


def shared_identity_matrix(n: int, dtype: Any = dtypes.uint8, dst: Any = None) -> NkiTensor:
    """An n x n identity in SBUF (a constant that the compiler loads)."""
    tensor = ndarray((n, n), dtype) if dst is None else dst
    out = destination("nki.language.shared_identity_matrix", "dst", tensor)
    if current("nki.language.shared_identity_matrix").values:
        out[...] = np.eye(n, dtype=np.float32)
    return tensor
