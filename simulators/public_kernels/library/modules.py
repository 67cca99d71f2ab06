"""`nki_cpu_simulator`, the package that nki-library's simulation mode looks for, made of ours.

Puts modules into sys.modules: nki_cpu_simulator.nki and its parts are our nki, with the extra
entry point `cpu_simulate(kernel)[lnc](**inputs)`; `neuronxcc` has the few names that tests take
from it. The generation is the run's (NEURON_PLATFORM_TARGET_OVERRIDE), whatever a test's default
says. For a process that runs nki-library's tests and nothing else.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from nxd_cp.simulators.nki_api import dtypes, install, simulate
from nxd_cp.simulators.nki_api.chips import generation_name

from . import neuron_dtypes

_PARTS = ("language", "isa", "isa.constants", "typing", "collectives")


class _Simulated:
    """kernel[lnc](**inputs) for the generation that the run is for."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = simulate(kernel)

    def __getitem__(self, lnc: int) -> Any:
        check_cores(lnc)
        return self.kernel[lnc]


def check_cores(lnc: int) -> None:
    """Skip a row that asks for two cores where a rank has one."""
    generation = generation_name()
    if lnc > 1 and generation == "gen2":
        pytest.skip(f"asks for {lnc} cores per rank; {generation} has 1")


def _module(name: str, **values: Any) -> types.ModuleType:
    module = types.ModuleType(name, "Part of nxd_cp's adapter for nki-library's tests.")
    module.__path__ = []
    module.__dict__.update(values)
    sys.modules[name] = module
    return module


def provide() -> None:
    """Make our modules importable under the vendor's names in this process."""
    install()
    nki = sys.modules["nki"]
    sys.modules["neuron_dtypes"] = neuron_dtypes
    names = {str(d): d for d in dtypes.ALL}
    element_types = sys.modules.get("nki.dtype") or _module("nki.dtype", **names)
    empty = {name: _module(f"nki.{name}") for name in ("builtin", "compiler", "tensor")}
    nki.__dict__.update(empty, cpu_simulate=_Simulated)
    parts = {name: sys.modules[f"nki.{name}"] for name in _PARTS} | empty
    _module("nki_cpu_simulator", nki=nki)
    sys.modules["nki_cpu_simulator.nki"] = nki
    for name, module in parts.items():
        sys.modules[f"nki_cpu_simulator.nki.{name}"] = module
    sys.modules["nki_cpu_simulator.nki.language.dtypes"] = element_types
    sys.modules["nki.language"].__dict__["dtypes"] = element_types
    typing = sys.modules["nki.typing"]
    _module("neuronxcc.nki.typing", tensor=typing.tensor, mutable_tensor=typing.tensor)
    _module("neuronxcc.starfish.support.dtype", static_cast=neuron_dtypes.static_cast)
    for name in ("starfish.support", "starfish", "nki"):
        _module(f"neuronxcc.{name}")
    _module("neuronxcc")
