"""The public kernels behind published rows, run as they are from clones of their repositories.

Does: find a kernel's file in a folder of clones, load it into the simulator under its own name, run
it in shape-only mode and hand back its log. Does not: copy anything, or read a published time; what
cannot be found or run is said.

Expected layout: PATH/<name of the repository>, or PATH itself for one repository.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import (
    NkiSimulatorWarning,
    NkiUnsupportedError,
    NkiValidationError,
    SimParams,
    load,
    parameters,
    record,
)
from nxd_cp.simulators.nki_api.log import Log

Array = tuple[tuple[int, ...], str]  # shape, dtype


class NotRun(Exception):
    """Why a public kernel could not be run."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A public kernel and what it is called with.

    folder: below the clones, what to put on the path. package: its top package, or "" for a module
    of its own. module: dotted name below the package. arrays: positional arguments, filled with
    zeros; named: arrays by keyword. options: other keyword arguments. lnc: cores of the grid.
    """

    folder: str
    module: str
    function: str
    arrays: tuple[Array, ...]
    package: str = ""
    named: tuple[tuple[str, Array], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    lnc: int = 1

    @property
    def file(self) -> str:
        """The file below `folder`."""
        return "/".join([*self.package.split("."), *self.module.split(".")]).strip("/") + ".py"


def run(kernel: Kernel, clones: Path, generation: str) -> Log:
    """Core 0's log; NotRun with the reason when a kernel is not there or does not run."""
    inputs = [_zeros(array) for array in kernel.arrays]
    named = {name: _zeros(array) for name, array in kernel.named}
    with _importable(_folder(kernel, clones)):
        try:
            if kernel.package:
                module = load(kernel.package, generation=generation, module=kernel.module)
            else:
                module = load(kernel.module, generation=generation)
            quiet = redirect_stdout(io.StringIO())  # kernels print warnings of their own
            with (
                quiet,
                warnings.catch_warnings(),
                parameters(SimParams(values=False)),
                record() as log,
            ):
                warnings.simplefilter("ignore", NkiSimulatorWarning)  # about style, not timing
                function = getattr(module, kernel.function)
                launched = function[kernel.lnc] if kernel.lnc > 1 else function
                launched(*inputs, **named, **dict(kernel.options))
        except (NkiUnsupportedError, NkiValidationError, ImportError) as error:
            raise NotRun(str(error).splitlines()[0][:80]) from error
    return log


def _folder(kernel: Kernel, clones: Path) -> Path:
    inside = Path(*Path(kernel.folder).parts[1:])
    for folder in (clones / kernel.folder, clones / inside):
        if (folder / kernel.file).exists():
            return folder
    raise NotRun(f"{kernel.folder}/{kernel.file} is not below {clones.name}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _zeros(array: Array) -> Any:
    shape, dtype = array
    if dtype == "bfloat16":
        import ml_dtypes

        return np.zeros(shape, ml_dtypes.bfloat16)
    return np.zeros(shape, dtype)
