"""Which stack, backend and transport a process on this machine will use, and why.

Does: put the findings of packages.py and machine.py into words. Does not: start anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nxd_cp.doctor.machine import Machine
from nxd_cp.doctor.packages import PRESENT, Found


@dataclass(frozen=True)
class Tier:
    """stack: "native", "xla" or "none". backend: what "auto" becomes. reasons: one per line."""

    stack: str
    backend: str
    reasons: tuple[str, ...]


def decide(packages: Sequence[Found], machine: Machine) -> Tier:
    """What `ring_attention(backend="auto")` does here."""
    have = {found.name for found in packages if found.state == PRESENT}
    reasons = [_why_not(found) for found in packages if found.detail and found.version]
    stack = "none"
    if "torch-neuronx" in have:
        stack = "xla" if "torch-xla" in have else "native"
        reasons.append(
            "stack: torch-neuronx with torch-xla is the XLA stack (training ended with SDK 2.29)"
            if stack == "xla"
            else "stack: torch-neuronx without torch-xla is the native one"
        )
    else:
        reasons.append("stack: no torch-neuronx, so no tensor can be on a Neuron device")
    if not machine.num_devices:
        reasons.append("devices: no /dev/neuron*, so nothing can run on a Neuron device here")
    if machine.problem:
        reasons.append(f"neuron-ls: {machine.problem}; instance type and links are unknown")
    if stack != "none" and "nki" not in have:
        reasons.append('kernels: no nki, so backend="nki" raises; install it from AWS\'s index')
    backend = "nki" if stack != "none" and machine.num_devices and "nki" in have else "torch"
    reasons.append(
        'backend: "auto" is "nki" for tensors on the device, "torch" for others'
        if backend == "nki"
        else 'backend: "auto" is "torch"'
    )
    if {"numpy", "ml_dtypes"} <= have:
        reasons.append('backend: "simulate" runs the kernels on the CPU, without times')
    else:
        reasons.append("backend: \"simulate\" needs pip install 'nxd-cp[sim]'")
    reasons.append(_transport(stack))
    return Tier(stack, backend, tuple(reasons))


def _transport(stack: str) -> str:
    if stack == "native":
        return (
            "transport: send and receive of torch.distributed, or all_to_all where a backend has "
            'none (messages="probe" finds out); not tried on a device'
        )
    if stack == "xla":
        return (
            "transport: permutes of the graph (CPContext.from_nxd, from_xla), as send and receive "
            "fail on XLA (aws-neuron-sdk issue 1189); not tried on a device"
        )
    return "transport: send and receive of torch.distributed (gloo), or threads of one process"


def _why_not(found: Found) -> str:
    return f"{found.name} {found.version}: {found.state} ({found.detail})"
