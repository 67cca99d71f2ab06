"""The public kernels behind published rows, run as they are from clones of their repositories.

Does: find a kernel's file in a folder of clones, load it into the simulator under its own name, run
it on zeros and hand back its log. Does not: copy anything; what cannot be found or run is said.

Expected layout: PATH/aws-neuron-sdk (github.com/aws-neuron/aws-neuron-sdk), or PATH itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import NkiUnsupportedError, NkiValidationError, load, record
from nxd_cp.simulators.nki_api.log import Log

EXAMPLES = "aws-neuron-sdk/nki/examples"


class NotRun(Exception):
    """Why a public kernel could not be run."""


@dataclass(frozen=True)
class Kernel:
    """A public kernel: folder below the clones, module, function, shapes and dtype of inputs."""

    folder: str
    module: str
    function: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str


def matmul_kernel(version: str, m: int, k: int, n: int, dtype: str) -> Kernel | None:
    """The tutorial's kernel of one version, or None when the tutorial has none."""
    names = {
        "tiled": "nki_matmul_tiled_",
        "hoist": "nki_matmul_hoist_load_",
        "block": "nki_matmul_block_free_dimension_",
        "full": "nki_matmul_fully_optimized_",
    }
    if version not in names:
        return None
    return Kernel(
        f"{EXAMPLES}/matrix_multiplication",
        "matrix_multiplication_nki_kernels",
        names[version],
        ((k, m), (k, n)),
        dtype,
    )


def mamba_kernel(version: int, channels: int, seq_len: int, states: int = 16) -> Kernel:
    """The tutorial's kernel of one version."""
    wide, rows = (1, channels, seq_len), (1, states, seq_len)
    return Kernel(
        f"{EXAMPLES}/fused_mamba",
        "mamba_nki_kernels",
        f"mamba_v{version}",
        (wide, wide, (channels, states), rows, rows),
        "float32",
    )


def run(kernel: Kernel, clones: Path, generation: str) -> Log:
    """The log of a public kernel; NotRun with the reason when it is not there or does not run."""
    inputs = [np.zeros(shape, _dtype(kernel.dtype)) for shape in kernel.shapes]
    with _importable(_folder(kernel, clones)):
        try:
            module = load(kernel.module, generation=generation)
            with record() as log:
                getattr(module, kernel.function)(*inputs)
        except (NkiUnsupportedError, NkiValidationError) as error:
            raise NotRun(str(error).splitlines()[0][:80]) from error
    return log


def _folder(kernel: Kernel, clones: Path) -> Path:
    inside = Path(*Path(kernel.folder).parts[1:])
    for folder in (clones / kernel.folder, clones / inside):
        if (folder / f"{kernel.module}.py").exists():
            return folder
    raise NotRun(f"{kernel.folder}/{kernel.module}.py is not below {clones.name}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
