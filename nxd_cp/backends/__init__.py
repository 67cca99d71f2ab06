"""The one place where a backend's name becomes a backend. An explicit request never falls back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nxd_cp.backends.base import Backend

if TYPE_CHECKING:
    from nxd_cp.backends.kernel_support import SupportKernels

KERNELS = {
    "simulate": "simulate",
    "nki": "nki",
    "simulate_loops": "simulate",
    "nki_loops": "nki",
    "simulate_ring": "simulate",
    "nki_ring": "nki",
}
"""Backends that run the NKI kernels, and where: in the simulator or on a Neuron device."""

LOOPS, RINGS = ("simulate_loops", "nki_loops"), ("simulate_ring", "nki_ring")
BACKENDS = ("torch", *KERNELS, "auto")
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
    """The backend called `name` for tensors on `device`; modules are imported when asked for.

    Those of `RINGS` compute no rectangle: `nxd_cp/device_ring.py` runs them.
    """
    resolved = resolve_backend_name(name, device)
    assert resolved not in RINGS, f"{resolved} has no blocks"
    if resolved == "torch":
        from nxd_cp.backends.torch_flash import TorchBackend

        return TorchBackend()
    from nxd_cp.backends.neuron import KernelBackend

    kernels, loops = KERNELS[resolved], resolved in LOOPS
    return KernelBackend(kernels, cores=cores_of(kernels), device_loops=loops)


def get_support_kernels(name: str) -> SupportKernels:
    """The small kernels beside a backend of `KERNELS`."""
    from nxd_cp.backends.kernel_support import SupportKernels

    return SupportKernels(KERNELS[name], cores=cores_of(KERNELS[name]))


def cores_of(kernels: str) -> int:
    """Physical cores of a launch (LNC): as the runtime groups them on a device, else 1.

    Also 1 where there is no nki: who launches then raises, and says why.
    """
    from nxd_cp.backends.device_ops import launch_cores
    from nxd_cp.backends.kernel_modules import has_nki

    return launch_cores() if kernels == "nki" and has_nki() else 1
