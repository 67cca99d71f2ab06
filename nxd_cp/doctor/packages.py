"""Which packages are here, in which version, and which of them only occupy a name.

PyPI has placeholders for AWS's packages: an install succeeds and nothing can be imported. Here a
package counts only when its module can be imported and has what we use of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

ABSENT, PLACEHOLDER, BROKEN, PRESENT = "absent", "placeholder", "broken", "present"


@dataclass(frozen=True)
class Wanted:
    """distribution: the name for pip. module: what is imported. needs: what it must have."""

    distribution: str
    module: str
    needs: str | None
    purpose: str


@dataclass(frozen=True)
class Found:
    """state: "present", "absent", "placeholder" or "broken" (a real package that fails to import).

    version: of the distribution, "" when there is none. detail: the error, when it is broken.
    """

    name: str
    state: str
    version: str
    purpose: str
    detail: str = ""


WANTED = (
    Wanted("torch", "torch", "Tensor", "everything"),
    Wanted("numpy", "numpy", "ndarray", "the simulator"),
    Wanted("ml_dtypes", "ml_dtypes", "bfloat16", "the simulator"),
    Wanted("nki", "nki", "jit", 'backend "nki"'),
    Wanted("neuronx-cc", "neuronxcc", "__version__", "compiling kernels"),
    Wanted("torch-neuronx", "torch_neuronx", "__version__", "tensors on a device"),
    Wanted("torch-xla", "torch_xla", "__version__", "the XLA stack"),
    Wanted("neuronx-distributed", "neuronx_distributed", "parallel_layers", "CPContext.from_nxd"),
    Wanted("nrtpy", "nrtpy", "NrtpyModel", "benchmarks of compiled kernels"),
)


def find(wanted: Wanted, load: Callable[[str], ModuleType] = importlib.import_module) -> Found:
    """Look for one package. load: replaced in tests."""
    try:
        version = importlib.metadata.version(wanted.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    state, detail = PRESENT, ""
    try:
        module = load(wanted.module)
        if getattr(module, "__simulated__", False):
            state, detail = ABSENT, "our simulator stands in for it in this process"
        elif wanted.needs is not None and not hasattr(module, wanted.needs):
            state, detail = PLACEHOLDER, f"no {wanted.module}.{wanted.needs}"
    except ImportError as error:
        state = PLACEHOLDER if version and _says_wrong(wanted, error) else ABSENT
        state = BROKEN if version and state == ABSENT else state
        detail = _first_line(error)
    except Exception as error:  # whatever a vendor's package raises while it is imported
        state, detail = BROKEN, f"{type(error).__name__}: {_first_line(error)}"
    return Found(wanted.distribution, state, version, wanted.purpose, detail)


def find_all() -> list[Found]:
    """All packages of `WANTED`."""
    return [find(wanted) for wanted in WANTED]


def _says_wrong(wanted: Wanted, error: ImportError) -> bool:
    """PyPI's placeholders raise a message of their own, or install no module at all."""
    missing = isinstance(error, ModuleNotFoundError) and error.name == wanted.module
    return missing or "WRONG PACKAGE" in str(error).upper() or "PLACEHOLDER" in str(error).upper()


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
