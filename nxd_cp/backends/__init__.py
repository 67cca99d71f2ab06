"""The one place where a backend's name becomes a backend. An explicit request never falls back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nxd_cp.backends.base import Backend

if TYPE_CHECKING:
    from nxd_cp.backends.kernel_support import SupportKernels

BACKENDS = ("torch", "simulate", "nki", "simulate_ring", "nki_ring", "auto")
NEURON_DEVICE_TYPES = ("neuron", "xla")


def resolve_backend_name(name: str, device: torch.device) -> str:
    """Turn "auto" into "nki" for tensors on a Neuron device, else "torch"; check other names.

    Raises ValueError for a name that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name != "auto":
        return name
    return "nki" if device.type in NEURON_DEVICE_TYPES else "torch"


def get_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name` for tensors on `device`; modules are imported when asked for."""
    resolved = resolve_backend_name(name, device)
    if resolved == "torch":
        from nxd_cp.backends.torch_flash import TorchBackend

        return TorchBackend()
    from nxd_cp.backends.neuron import KernelBackend, has_nki

    if resolved == "nki" and has_nki():
        from nxd_cp.backends.device_ops import launch_cores

        return KernelBackend(resolved, cores=launch_cores())
    return KernelBackend(resolved)  # without nki it raises, and says why


def get_support_kernels(name: str) -> SupportKernels:
    """The small kernels of backend "nki" or "simulate"."""
    from nxd_cp.backends.kernel_modules import has_nki
    from nxd_cp.backends.kernel_support import SupportKernels

    if name == "nki" and has_nki():
        from nxd_cp.backends.device_ops import launch_cores

        return SupportKernels(name, cores=launch_cores())
    return SupportKernels(name)
