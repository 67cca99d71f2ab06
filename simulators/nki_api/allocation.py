"""Making tensors: ndarray, and the helpers that allocate and fill.

Not here: views (tensor.py), placement (memory.py).
Source: nki.language.ndarray, zeros, ones, full, shared_identity_matrix; NkiTensor, memory regions.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import dtypes
from .checks import destination
from .dtypes import DType
from .errors import fail, unsupported
from .isa.copy import memset
from .memory import HBM, MemoryRegion, hbm_storage
from .rules import documented
from .runtime import current
from .tensor import NkiTensor, row_major

_SHAPE = documented(
    "ndarray.shape", "nki.language.ndarray", "a shape is 1 to 5 positive integers, 2 to 5 on chip"
)
_BUFFER = documented(
    "ndarray.buffer",
    "NKI migration guide",
    "buffer is one of nl.sbuf, nl.psum, nl.hbm, nl.private_hbm, nl.shared_hbm",
)

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
    sizes = _shape(shape, buffer)
    if buffer is sbuf or buffer is psum:
        number = run.next_number()
        storage = run.core.allocate(sizes, kind, buffer, name, number, address)
    else:
        num_bytes = kind.itemsize
        for count in sizes:
            num_bytes *= count
        storage = hbm_storage(num_bytes, kind, buffer, name)
        storage.number = run.next_number()
        storage.silent = not run.values
    if run.log is not None:
        run.describe_buffer(storage)
    frame = sys._getframe(1)
    storage.site = (frame.f_code, frame.f_lineno)
    return NkiTensor(storage, sizes, row_major(sizes), 0, kind)


def _shape(shape: Any, buffer: Any) -> tuple[int, ...]:
    if not isinstance(buffer, MemoryRegion):
        fail(_BUFFER, "nki.language.ndarray", f"buffer={buffer!r}")
    try:
        sizes = tuple(int(n) for n in shape)
    except TypeError:
        sizes = (int(shape),)
    least = 1 if is_hbm(buffer) else 2
    if not least <= len(sizes) <= 5 or min(sizes) < 1:
        fail(_SHAPE, "nki.language.ndarray", f"shape {shape} in {buffer.value}")
    return sizes


def zeros(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """ndarray and memset(0), on chip."""
    tensor = ndarray(shape, dtype, buffer, name)
    if tensor.space == HBM:
        unsupported("nl.zeros in HBM")
    memset(tensor, 0)
    return tensor


def ones(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """ndarray and memset(1), on chip."""
    tensor = ndarray(shape, dtype, buffer, name)
    if tensor.space == HBM:
        unsupported("nl.ones in HBM")
    memset(tensor, 1)
    return tensor


def full(
    shape: Any, fill_value: float, dtype: Any, buffer: Any = sbuf, name: str = ""
) -> NkiTensor:
    """ndarray and memset(fill_value), on chip."""
    tensor = ndarray(shape, dtype, buffer, name)
    if tensor.space == HBM:
        unsupported("nl.full in HBM")
    memset(tensor, fill_value)
    return tensor


def shared_identity_matrix(n: int, dtype: Any = dtypes.uint8, dst: Any = None) -> NkiTensor:
    """An n x n identity in SBUF (a constant that the compiler loads)."""
    tensor = ndarray((n, n), dtype) if dst is None else dst
    out = destination("nki.language.shared_identity_matrix", "dst", tensor)
    if current("nki.language.shared_identity_matrix").values:
        out[...] = np.eye(n, dtype=np.float32)
    return tensor
