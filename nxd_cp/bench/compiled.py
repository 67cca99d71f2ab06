"""Compile kernels without a device: NKI's front end, then neuronx-cc, for any target.

Does: record the launches that a case makes, compile each, keep errors and what the compiler's log
says of latency. Does not: run anything; `nxd-cp bench neff` times a NEFF on an instance.

The two calls are those of the test harness of aws-neuron/nki-library@d2ad3a5
(test/utils/kernel_tracer.py), which have no documentation of their own. Stub-tested; not tried with
the vendor's wheels.
"""

from __future__ import annotations

import importlib
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends.device_ops import Launch, record_launches
from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import OurKernels
from nxd_cp.bench.numerics import make_inputs

_ESTIMATE = re.compile(r"estimat|latency|cycles", re.IGNORECASE)


@dataclass(frozen=True)
class Compiled:
    """One launch. neff: None when it failed. error: the compiler's first line, "" when it did not.

    estimates: the compiled object's static estimate, and lines of the compiler's log that speak of
    an estimate, latency or cycles, as found.
    """

    target: str
    case: str
    cores: int
    seconds: float
    neff: Path | None
    error: str
    estimates: tuple[str, ...]


def launches(case: Case, ours: OurKernels) -> list[Launch]:
    """What the host launches for a case, recorded with CPU tensors."""
    with record_launches() as found:
        ours.prepare(case, make_inputs(case))()
    return found


def compile_launch(
    launch: Launch,
    target: str,
    case: str,
    folder: Path,
    load: Callable[[str], Any] = importlib.import_module,
) -> Compiled:
    """Compile one launch for `target` (trn1, trn2, trn3) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    neff: Path | None = None
    error = ""
    static: tuple[str, ...] = ()
    try:
        compiled = _compile(launch, target, folder, load)
        neff, static = Path(compiled.neff_path), _static(compiled)
    except Exception as failure:  # whatever a compiler raises is the finding
        first = next((line for line in str(failure).splitlines() if line.strip()), "")
        error = f"{type(failure).__name__}: {first}"
    seconds = time.perf_counter() - start
    said = (*static, *_estimates(folder))
    return Compiled(target, case, launch.cores, seconds, neff, error, said)


def _compile(launch: Launch, target: str, folder: Path, load: Callable[[str], Any]) -> Any:
    frontend = load("nki.compiler.frontend").ParserFrontend()
    driver = load("nki.compiler.ncc_driver")
    found = frontend.compile(
        launch.kernel,
        inputs=named_arguments(launch),
        target=target,
        lnc=launch.cores,
        artifacts_dir=str(folder),
    )
    options = driver.CompileOptions(
        target=target,
        lnc=launch.cores,
        output_path=str(folder / "kernel.neff"),
        artifacts_dir=str(folder / "artifacts"),
        neuronx_cc_args=(),
    )
    return driver.CompiledKernel.from_frontend(found, options)


def named_arguments(launch: Launch) -> dict[str, Any]:
    """The kernel's arguments by name, defaults included, tensors as NumPy arrays."""
    function = inspect.unwrap(getattr(launch.kernel, "func", launch.kernel))
    bound = inspect.signature(function).bind(*launch.args, **launch.kwargs)
    bound.apply_defaults()
    return {name: _to_numpy(value) for name, value in bound.arguments.items()}


def _to_numpy(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_to_numpy(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.contiguous().numpy()


def _static(compiled: Any) -> tuple[str, ...]:
    """The compiler's own static estimate, where the compiled object has one (NKI 0.6)."""
    names = ("total_time_ns", "estimated_utilization")
    return tuple(f"{name} = {getattr(compiled, name)}" for name in names if hasattr(compiled, name))


def _estimates(folder: Path) -> tuple[str, ...]:
    """Lines of log files below `folder`, at most 40."""
    found = []
    for path in sorted(folder.rglob("*log*")):
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            found += [line.strip()[:200] for line in lines if _ESTIMATE.search(line)]
    return tuple(found[:40])
