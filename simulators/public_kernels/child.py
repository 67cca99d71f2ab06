"""The child processes: their command lines and environment.

Each kernel runs in a process of its own, whose working directory is a scratch folder; Python
writes no bytecode and pytest no cache, so that the clone stays untouched.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .catalogue import LIBRARY, Kernel

_PLUGIN = "nxd_cp.simulators.public_kernels.library.plugin"
_SCRIPTS = "nxd_cp.simulators.public_kernels.scripts"
TARGETS = {"gen2": "trn1", "gen3": "trn2", "gen4": "trn3"}


@dataclass(frozen=True)
class Limits:
    """How much of a kernel is run. 0 means no limit.

    rows: at most this many rows. row_seconds, gigabytes: a row that takes more is skipped. seconds:
    no new row starts later than this. Seconds are processor time. large: run shapes that
    nki-library itself skips in its simulation mode. seed: draw the rows with it.
    """

    rows: int = 12
    row_seconds: float = 60.0
    seconds: float = 480.0
    large: bool = True
    gigabytes: float = 8.0
    seed: str = ""


def command(
    kernel: Kernel, clone: Path, file: Path, generation: str, limits: Limits, *, go_on: bool = False
) -> list[str]:
    """The command line that runs a kernel's rows and appends their outcomes to `file`.

    go_on: an earlier child of this run has stopped; what failed there is not run again.
    """
    if kernel.clone != LIBRARY:
        arguments = [str(clone / kernel.path), kernel.name, str(file), str(limits.row_seconds)]
        return [sys.executable, "-m", _SCRIPTS, *arguments]
    tests = clone / "test"
    options = [
        *("-p", _PLUGIN, "-p", "no:cacheprovider", "-q", "--tb=line"),
        *("-c", str(tests / "pytest.ini"), "--rootdir", str(tests)),
        *("-o", "log_level=ERROR", "-o", "artifacts_dir=artifacts"),
        *("--test-mode", "simulation", "--platform-target", TARGETS[generation]),
        *("--output-directory", "output", "--force-local-cleanup"),
        *("--rows-kernel", kernel.name, "--rows-file", str(file), "--rows", str(limits.rows)),
        *("--row-gigabytes", str(limits.gigabytes)),
        *("--row-seconds", str(limits.row_seconds), "--rows-seconds", str(limits.seconds)),
    ]
    if limits.seed:
        options += ["--rows-seed", limits.seed]
    if kernel.tolerated:
        options += ["--rows-tolerate", ",".join(kernel.tolerated)]
    if go_on:
        options.append("--rows-go-on")
    if kernel.select:
        options += ["-k", kernel.select]
    return [sys.executable, "-m", "pytest", *options, str(clone / kernel.path)]


def environment(kernel: Kernel, clone: Path, generation: str, limits: Limits) -> dict[str, str]:
    """The environment of that process: our package and the clone importable, one BLAS thread."""
    ours = Path(__file__).resolve().parents[2]
    places = [ours]
    if kernel.clone == LIBRARY:
        places += [clone, clone / "src"]
    inherited = os.environ.get("PYTHONPATH")
    paths = [*map(str, places), *([inherited] if inherited else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NEURON_PLATFORM_TARGET_OVERRIDE": generation,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
        "NKILIB_SIMULATION_RUN_ALL": "1" if limits.large else "0",
    }
