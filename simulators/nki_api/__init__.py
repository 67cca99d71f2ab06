"""The NKI language on NumPy: run and check NKI kernels on a CPU.

    from nxd_cp.simulators.nki_api import load

    kernels = load("my_package.kernels", generation="gen3")
    out = kernels.my_module.my_kernel(array)

Functional only: no timing. Imports neither torch nor nki.
"""

from .errors import (
    NkiDeadlockError,
    NkiSimulatorWarning,
    NkiUnsupportedError,
    NkiValidationError,
)
from .jit import Kernel, simulate, simulate_ranks
from .loading import install, load, real_nki_present
from .log import Exchange, Log, Record, View
from .params import SimParams, parameters
from .rules import RULES, Rule
from .runtime import record

__all__ = [
    "RULES",
    "Exchange",
    "Kernel",
    "Log",
    "NkiDeadlockError",
    "NkiSimulatorWarning",
    "NkiUnsupportedError",
    "NkiValidationError",
    "Record",
    "Rule",
    "SimParams",
    "View",
    "install",
    "load",
    "parameters",
    "real_nki_present",
    "record",
    "simulate",
    "simulate_ranks",
]
