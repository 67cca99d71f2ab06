"""The kernels' modules, bound to a Neuron device or to the simulator.

Does: find `nki`, load a file of `kernels/`. Does not: launch or check anything else.
"""

from __future__ import annotations

import importlib
from typing import Any

from nxd_cp.backends.device_ops import DeviceModule


def has_nki() -> bool:
    """Whether a real `nki` can be imported: neither PyPI's placeholder nor our simulator counts."""
    try:
        nki = importlib.import_module("nki")
    except ImportError:
        return False
    return hasattr(nki, "jit") and not getattr(nki, "__simulated__", False)


def generation_of(backend: str, generation: str | None) -> str | None:
    """The chip that "simulate" imitates as "gen2", "gen3" or "gen4"; a device's is not known."""
    if backend != "simulate":
        return generation
    from nxd_cp.simulators.nki_api.chips import generation_name

    return generation_name(generation)


def kernel_module(backend: str, generation: str | None, name: str, kernel: str = "") -> Any:
    """`nxd_cp.kernels.<name>`; on a device its kernel (or `name`) is launched through its op.

    Raises ValueError for backend "nki" with a generation, or without the Neuron SDK.
    """
    if backend == "simulate":
        from nxd_cp.simulators.nki_api import load

        return getattr(load("nxd_cp.kernels", generation=generation), name)
    if generation is not None:
        raise ValueError(
            f'expected no generation for backend "{backend}", got {generation!r}: the device has '
            'its own; use backend "simulate"'
        )
    if not has_nki():
        raise ValueError(
            'backend "nki" needs the nki package of the AWS Neuron SDK, which cannot be imported '
            'here (the package of that name on PyPI is a placeholder); use backend="simulate" '
            'or backend="torch"'
        )
    module = importlib.import_module(f"nxd_cp.kernels.{name}")
    kernel = kernel or name
    return DeviceModule(module, kernel) if hasattr(module, kernel) else module
