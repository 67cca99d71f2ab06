"""Arrays in and out of a kernel: NumPy and torch (recognised by module name, never imported).

Inputs become HBM tensors over the caller's own memory where it is contiguous, so a kernel that
writes an input changes the caller's array, as the vendor documents. Results come back in the
kind of the inputs. 16-bit brain floats of torch travel as int16 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from . import dtypes
from .dtypes import fill_unwritten
from .errors import broken, fail
from .initmap import FRESH
from .memory import HBM, MemoryRegion, hbm_storage
from .rules import documented, inferred
from .runtime import Run
from .tensor import NkiTensor, row_major

_OUTPUT = documented(
    "kernel.output",
    "NKI migration guide",
    "a kernel returns tensors allocated with buffer=nl.shared_hbm",
)
_UNWRITTEN = inferred(
    "kernel.unwritten_output",
    "nki.language guide, Creating Tensors",
    "a kernel writes every element of what it returns",
)
_TORCH_BITS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
}


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch.Tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _torch_to_numpy(value: Any) -> Any:
    torch = sys.modules["torch"]
    if value.device.type != "cpu":
        raise ValueError(f"expected a CPU tensor, got one on {value.device}; move it first")
    plain = value.detach()
    bits = _TORCH_BITS.get(str(plain.dtype).removeprefix("torch."))
    if bits is None:
        return plain.numpy()
    return plain.view(getattr(torch, bits[0])).numpy().view(bits[1])


def _numpy_to_torch(array: Any) -> Any:
    torch = sys.modules["torch"]
    for name, (carrier, numpy_type) in _TORCH_BITS.items():
        if array.dtype == numpy_type:
            return torch.from_numpy(array.view(carrier)).view(getattr(torch, name))
    return torch.from_numpy(array)


def tensor_from_array(
    run: Run, array: Any, name: str, after: list[Callable[[], None]]
) -> NkiTensor:
    """An HBM tensor over `array`; when that needs a copy, `after` gets the copy back."""
    dtype = dtypes.dtype_of(array.dtype)
    usable = array.flags.c_contiguous and array.flags.writeable
    dense = array if usable else np.array(array, order="C", copy=True)
    if not usable and array.flags.writeable:
        before = dense.copy()

        def copy_back() -> None:
            if dense.tobytes() != before.tobytes():
                array[...] = dense

        after.append(copy_back)
    flat = dense.reshape(-1).view(np.uint8)
    storage = hbm_storage(flat.size, dtype, MemoryRegion.shared_hbm, name, flat)
    storage.number = run.next_number()
    if run.log is not None:
        run.describe_buffer(storage)
    shape = tuple(array.shape) or (1,)
    return NkiTensor(storage, shape, row_major(shape), 0, dtype)


def to_device(run: Run, value: Any, name: str, after: list[Callable[[], None]]) -> Any:
    """Replace arrays in an argument (also inside tuples, lists and dicts) by HBM tensors."""
    if isinstance(value, np.ndarray):
        return tensor_from_array(run, value, name, after)
    if is_torch(value):
        return tensor_from_array(run, _torch_to_numpy(value), name, after)
    if type(value) in (tuple, list):
        return type(value)(to_device(run, v, f"{name}[{i}]", after) for i, v in enumerate(value))
    if type(value) is dict:
        return {k: to_device(run, v, f"{name}[{k!r}]", after) for k, v in value.items()}
    return value


def to_host(value: Any, as_torch: bool) -> Any:
    """Replace returned tensors by arrays."""
    if type(value) is NkiTensor:
        if value.space != HBM or value.buffer is not MemoryRegion.shared_hbm:
            fail(_OUTPUT, "nki.jit", "the kernel returns another kind of tensor", output=value)
        init = value.storage.init
        if init.uniform <= 0 and FRESH in init.codes(value.rect, value.dense, value.pattern):
            if init.uniform == FRESH:
                value.storage.fill()
            broken(_UNWRITTEN, "nki.jit", "part of an output was never written", output=value)
        array = value.array
        if value.storage.silent:
            array = np.empty(value.shape, value.dtype.np_dtype)
            fill_unwritten(array, value.dtype)
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        return _numpy_to_torch(array) if as_torch else array
    if type(value) in (tuple, list):
        return type(value)(to_host(v, as_torch) for v in value)
    if type(value) is dict:
        return {k: to_host(v, as_torch) for k, v in value.items()}
    return value
