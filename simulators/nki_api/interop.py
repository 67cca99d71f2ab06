"""Arrays in and out of a kernel: NumPy and torch (recognised by module name, never imported).

Inputs become HBM tensors over the caller's own memory where it is contiguous, so a kernel that
writes an input changes the caller's array, as the vendor documents; a read-only one cannot be
written. Results come back in the kind of the inputs. 16-bit brain floats of torch travel as int16
bits.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.ma import MaskedArray

from . import dtypes
from .dtypes import fill_unwritten
from .errors import blamed, broken, definition, fail
from .initmap import FRESH
from .memory import HBM, MemoryRegion
from .nki_object import NKIObject
from .registers import Register
from .rules import documented, inferred
from .runtime import Run
from .tensor import NkiTensor, row_major

_OUTPUT = documented(
    "kernel.output",
    "NKI migration guide",
    "a kernel returns tensors allocated with buffer=nl.shared_hbm, alone or in containers",
)
_UNWRITTEN = inferred(
    "kernel.unwritten_output",
    "nki.language guide, Creating Tensors",
    "a kernel writes every element of what it returns",
)
_IO_OUTPUT = documented(
    "kernel.collective_output",
    "aws-neuron/nki-library@d2ad3a5, test_collectives.py",
    "a collective neither reads nor writes the kernel's outputs; copy them",
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


def as_numpy(value: Any) -> Any:
    """A NumPy array over an array or torch tensor."""
    return _torch_to_numpy(value) if is_torch(value) else value


def arrays_in(value: Any, inside: tuple[int, ...] = ()) -> Iterator[Any]:
    """The arrays and torch tensors of an argument, also inside tuples, lists, dicts and objects.

    inside: ids of the objects on the way here; one that holds itself is not entered again.
    """
    if isinstance(value, np.ndarray) or is_torch(value):
        yield value
    elif type(value) in (tuple, list):
        for part in value:
            yield from arrays_in(part, inside)
    elif type(value) is dict:
        yield from arrays_in(list(value.values()), inside)
    elif id(value) not in inside:
        yield from arrays_in(list(_fields(value).values()), (*inside, id(value)))


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or an NKIObject; none of anything else."""
    if isinstance(value, type):
        return {}
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    return vars(value) if isinstance(value, NKIObject) else {}


def tensor_from_array(
    run: Run, value: Any, name: str, after: list[Callable[[], None]]
) -> NkiTensor:
    """An HBM tensor over the caller's array, the same one for every core of a rank.

    `after` gets what to do when the kernel has ended: the copy back, where a copy was needed.
    """
    found = run.rank.inputs.get(id(value))
    if found is None:
        found = run.rank.inputs[id(value)] = _new_input(run, value, name, after)
    return NkiTensor(found.storage, found.shape, found.strides, 0, found.dtype)


def _new_input(run: Run, value: Any, name: str, after: list[Callable[[], None]]) -> NkiTensor:
    array = as_numpy(value)
    if isinstance(array, MaskedArray):
        raise ValueError(f"expected an array without a mask for {name!r}; fill it first")
    try:
        dtype = dtypes.dtype_of(array.dtype)
    except ValueError as error:
        raise ValueError(f"argument {name!r}: {error}") from None
    shared = run.rank.copies.get(id(value))
    wide = not run.core.precise and dtype in dtypes.LOW_PRECISION
    usable = shared is None and array.flags.c_contiguous and not wide
    dense = array if shared is None else shared
    if not usable:
        dense = np.array(dense, np.float32 if wide else array.dtype, order="C", copy=True)
    if not array.flags.writeable and shared is None:
        dense.flags.writeable = False  # a kernel that writes it is told so
    elif not usable:
        before = dense.copy()

        def copy_back() -> None:
            if dense.tobytes() == before.tobytes():
                return
            if shared is not None:
                raise ValueError(
                    f"the kernel writes its input {name!r}, which shares memory with an input of "
                    f"another rank (seen on {run.place}); pass every rank an array of its own"
                )
            array[...] = dense

        after.append(copy_back)
    flat = dense.reshape(-1).view(np.uint8)
    num_bytes = dense.size * dtype.itemsize
    storage = run.new_hbm(num_bytes, dtype, MemoryRegion.shared_hbm, name, flat)
    storage.io = True
    shape = tuple(array.shape) or (1,)
    return NkiTensor(storage, shape, row_major(shape), 0, dtype)


def to_device(
    run: Run,
    value: Any,
    name: str,
    after: list[Callable[[], None]],
    inside: tuple[int, ...] = (),
) -> Any:
    """Replace arrays in an argument by HBM tensors, also inside tuples, lists, dicts and objects.

    An object (a dataclass or an NKIObject) that holds arrays is copied; the caller's keeps its own.
    """
    if isinstance(value, np.ndarray) or is_torch(value):
        return tensor_from_array(run, value, name, after)
    if type(value) in (tuple, list):
        parts = [to_device(run, v, f"{name}[{i}]", after, inside) for i, v in enumerate(value)]
        return type(value)(parts)
    if type(value) is dict:
        return {k: to_device(run, v, f"{name}[{k!r}]", after, inside) for k, v in value.items()}
    if id(value) not in inside and any(True for _ in arrays_in(value)):
        made, inside = copy.copy(value), (*inside, id(value))
        for field, held in _fields(value).items():
            held = to_device(run, held, f"{name}.{field}", after, inside)
            object.__setattr__(made, field, held)
        return made
    return value


def to_host(value: Any, as_torch: bool, function: Any) -> Any:
    """Replace returned tensors by arrays; errors show where they were allocated."""
    if type(value) is NkiTensor:
        with blamed(value.storage.site or definition(function)):
            return _output(value, as_torch)
    if type(value) in (tuple, list):
        return type(value)(to_host(v, as_torch, function) for v in value)
    if type(value) is dict:
        return {k: to_host(v, as_torch, function) for k, v in value.items()}
    if isinstance(value, (NkiTensor, Register, set, frozenset, Generator, Coroutine)):
        with blamed(definition(function)):
            fail(_OUTPUT, "nki.jit", f"the kernel returns a {type(value).__name__}", output=value)
    return value


def _output(value: NkiTensor, as_torch: bool) -> Any:
    """The array of one returned tensor, checked."""
    if value.space != HBM or value.buffer is not MemoryRegion.shared_hbm:
        fail(_OUTPUT, "nki.jit", "the kernel returns another kind of tensor", output=value)
    if value.storage.collective:
        fail(_IO_OUTPUT, "nki.jit", "a collective's tensor is returned", output=value)
    init = value.storage.init
    if init.fresh(value.region):
        if init.uniform == FRESH:
            value.storage.fill()
        broken(_UNWRITTEN, "nki.jit", "part of an output was never written", output=value)
    array = value.array
    if value.storage.silent:
        array = np.empty(value.shape, value.storage.stored_as(value.dtype))
        fill_unwritten(array, value.dtype)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if value.dtype is dtypes.bool_:
        array = array.view(np.bool_)
    return _numpy_to_torch(array) if as_torch else array
