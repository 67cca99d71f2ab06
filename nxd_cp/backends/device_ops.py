"""The kernels on a Neuron device, as registered torch ops of the stack that the tensors belong to.

A kernel's arguments are tensors, tuples of tensors and compile-time constants, and they grow with
the kernels. So each kernel is one op `nxd_cp::<name>(Tensor[] tensors, str call) -> Tensor[]`,
where `call` says as JSON how the arguments are made of the tensors, which constants go with them,
and on how many physical cores (LNC) it runs. Its shapes without data (fake kernels) are by hand.

- native (device "neuron"): registered with `torch_neuronx.nki_op`, the documented way
  (Neuron SDK docs, nki/get-started/about and frameworks/torch/pytorch-native-overview);
- XLA (device "xla"): registered with `torch.library.custom_op`; `nki.jit` turns a call on XLA
  tensors into a custom call of the graph (nki/guides/framework_custom_op).

In both the kernel is called as `kernel[cores](...)`. Tested with stand-ins; never run on a device.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
STACKS = {"neuron": "native", "xla": "xla"}
Op = Callable[[list[Tensor], str], list[Tensor]]

_OPS: dict[tuple[str, str], Op] = {}
_OPS_LOCK = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not made."""

    kernel: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cores: int


_RECORDER: ContextVar[list[Launch] | None] = ContextVar("nxd_cp_recorder", default=None)


class DeviceModule:
    """A kernel's module whose kernel is launched through its op; all else is the module's own."""

    def __init__(self, module: ModuleType | Any, name: str) -> None:
        self._module = module
        setattr(self, name, DeviceKernel(getattr(module, name), name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class DeviceKernel:
    """`kernel(...)` or `kernel[cores](...)`, on tensors of a Neuron device."""

    def __init__(self, kernel: Any, name: str, cores: int = 1) -> None:
        self._kernel, self._name, self._cores = kernel, name, cores

    def __getitem__(self, cores: int) -> DeviceKernel:
        return DeviceKernel(self._kernel, self._name, cores)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A tuple of tensors, or the only one, as the kernel returns it."""
        tensors, call = pack(args, kwargs, self._cores)
        recorder = _RECORDER.get()
        if recorder is not None:
            recorder.append(Launch(self._kernel, self._name, args, kwargs, self._cores))
            found = [x.zero_() for x in outputs_like(self._name, tensors)]
        else:
            found = registered(self._name, self._kernel, stack_of(tensors[0].device))(tensors, call)
        return found[0] if len(found) == 1 else tuple(found)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within, kernels of this thread are not launched but listed; they return zeros."""
    launches: list[Launch] = []
    token = _RECORDER.set(launches)
    try:
        yield launches
    finally:
        _RECORDER.reset(token)


def stack_of(device: torch.device) -> str:
    """ "native" or "xla". Raises ValueError for tensors that are on no Neuron device."""
    if device.type not in STACKS:
        raise ValueError(
            f'backend "nki": expected tensors on a Neuron device (neuron or xla), got {device}; '
            'move them there, or use backend="simulate" or backend="torch"'
        )
    return STACKS[device.type]


def launch_cores(load: Callable[[str], Any] = importlib.import_module) -> int:
    """Physical cores of a launch (LNC), which must be those that the runtime groups.

    NEURON_LOGICAL_NC_CONFIG where it is set; else the default of the chip: 2 on trn2 (documented)
    and trn3 (taken as the same), 1 on trn1 and inf2. Raises ValueError for another value,
    or when the chip cannot be told.
    Source: Neuron SDK docs, about-neuron/arch/neuron-features/logical-neuroncore-config.
    """
    given = os.environ.get(LNC_VARIABLE)
    if given is not None:
        if given not in ("1", "2"):
            raise ValueError(f"{LNC_VARIABLE}: expected 1 or 2, got {given!r}")
        return int(given)
    try:
        chip = str(load("torch_neuronx.utils").get_platform_target())
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected {LNC_VARIABLE}=1 or 2, as the runtime has it, got nothing, and the chip "
            f"cannot be told ({error}); set it"
        ) from error
    return 2 if chip.startswith(("trn2", "trn3")) else 1


def registered(name: str, kernel: Any, stack: str) -> Op:
    """The op of a kernel, registered at its first use. Raises ValueError without the stack."""
    with _OPS_LOCK:
        if (name, stack) not in _OPS:
            _OPS[name, stack] = _register(name, kernel, stack)
        return _OPS[name, stack]


def _register(name: str, kernel: Any, stack: str) -> Op:
    def launch(tensors: list[Tensor], call: str) -> list[Tensor]:
        args, kwargs, cores = unpack(tensors, call)
        found = kernel[cores](*args, **kwargs)
        return list(found) if isinstance(found, tuple | list) else [found]

    full_name = f"nxd_cp::{name}"
    if stack == "native":
        try:
            nki_op = importlib.import_module("torch_neuronx").nki_op
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"expected native torch-neuronx (2.13.3 or newer) with nki_op, got: {error}"
            ) from error
        op = nki_op(full_name, mutates_args={})(launch)
    else:
        op = torch.library.custom_op(full_name, mutates_args=())(launch)
    if hasattr(op, "register_fake"):
        op.register_fake(lambda tensors, call: outputs_like(name, tensors))
    found: Op = op
    return found


def outputs_like(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """Uninitialised results of a kernel, from its tensors in the order of its arguments."""
    first = tensors[0]
    if name in ("flash_fwd", "loop_fwd", "ring_fwd"):  # o, lse (statistics) of q, k, v
        widths = (tensors[2].shape[-1], 1) if name == "ring_fwd" else (tensors[2].shape[-1], 1, 2)
        shapes = [(*first.shape[:-1], width) for width in widths]
    elif name in ("flash_bwd", "loop_bwd", "ring_bwd"):  # dq, dk, dv of do, q, k, v
        shapes = [tuple(x.shape) for x in tensors[1:4]]
    elif name == "merge":  # o, lse of o, lse, o, lse
        shapes = [tuple(x.shape) for x in tensors[:2]]
    elif name == "row_delta":
        shapes = [(*first.shape[:-1], 1)]
    elif name == "permute_tokens":
        return [torch.empty_like(first)]
    else:
        raise ValueError(f"kernel: expected one of this package's, got {name!r}")
    return [first.new_empty(shape, dtype=torch.float32) for shape in shapes]


def pack(args: tuple[Any, ...], kwargs: dict[str, Any], cores: int) -> tuple[list[Tensor], str]:
    """The tensors in order, and everything else as JSON. Raises ValueError for other objects."""
    tensors: list[Tensor] = []

    def encode(value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            tensors.append(value)
            return ["tensor", len(tensors) - 1]
        if isinstance(value, tuple | list):
            return ["tuple", [encode(item) for item in value]]
        if value is None or isinstance(value, bool | int | float | str):
            return ["constant", value]
        raise ValueError(
            f"expected tensors, tuples of them and constants as kernel arguments, got {value!r}"
        )

    call = [encode(args)[1], {key: encode(value) for key, value in kwargs.items()}, cores]
    return tensors, json.dumps(call)


def unpack(tensors: list[Tensor], call: str) -> tuple[list[Any], dict[str, Any], int]:
    """What `pack` took: positional arguments, keywords, cores."""

    def decode(entry: list[Any]) -> Any:
        kind, value = entry
        if kind == "tensor":
            return tensors[value]
        return tuple(decode(item) for item in value) if kind == "tuple" else value

    args, kwargs, cores = json.loads(call)
    return [decode(x) for x in args], {key: decode(x) for key, x in kwargs.items()}, cores
