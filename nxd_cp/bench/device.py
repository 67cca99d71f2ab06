"""Times on a Neuron device: by the host's clock around launches, or by nrtpy for a compiled NEFF.

Written from the documentation (Neuron SDK docs: neuron-runtime/nrtpy/model, frameworks/torch);
stub-tested, never run on a device.

Note [Which clock]
    The host's clock sees launch and wait too, so it is an upper bound of a kernel's time; short
    kernels drown in it. nrtpy (Neuron 2.32 and newer) measures on the device, but wants a NEFF and
    cannot be installed beside nki: compile with NEURON_FRAMEWORK_DEBUG=1, then time the NEFF in an
    environment of its own. nki.benchmark exists up to SDK 2.29 only, for kernels written in
    neuronxcc.nki; ours are not.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import Implementation
from nxd_cp.bench.numerics import make_inputs
from nxd_cp.bench.report import Times


@dataclass(frozen=True)
class HostClockTimer:
    """Latencies of single launches on `device` ("xla" or "neuron"), launch and wait included."""

    device: str
    wait: Callable[[], None]
    warmup: int = 10
    repeats: int = 100
    source: str = "measured"

    def time(self, case: Case, implementation: Implementation) -> Times:
        """Percentiles over `repeats` launches."""
        call = implementation.prepare(case, make_inputs(case).to(self.device))
        samples = []
        for index in range(self.warmup + self.repeats):
            start = time.perf_counter()
            result = call()
            self.wait()
            elapsed = time.perf_counter() - start
            del result
            if index >= self.warmup:
                samples.append(1e6 * elapsed)
        return percentiles(samples, "host clock, launch and wait included")


def percentiles(us: Sequence[float], note: str = "") -> Times:
    """p50, p90, p99 by nearest rank, the least and the most, of at least one sample."""
    ordered = sorted(us)

    def at(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    found = {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "min": at(0.0), "max": ordered[-1]}
    return Times("p50", found, f"{len(ordered)} samples, {note}")


def waiter(device: str, load: Callable[[str], Any] = importlib.import_module) -> Callable[[], None]:
    """What waits until all work on `device` is done. Raises ValueError for another device."""
    if device == "xla":
        torch_xla, model = load("torch_xla"), load("torch_xla.core.xla_model")

        def wait() -> None:
            torch_xla.sync()
            model.wait_device_ops()

        return wait
    if device == "neuron":
        load("torch_neuronx")
        synchronize: Callable[[], None] = load("torch").neuron.synchronize
        return synchronize
    raise ValueError(f'device: expected "xla" or "neuron", got {device!r}')


def time_neff(
    neff: Path,
    inputs: dict[str, Any],
    *,
    warmup: int = 10,
    repeats: int = 100,
    load: Callable[[str], Any] = importlib.import_module,
) -> Times:
    """Device time of a compiled kernel, one execution per sample.

    inputs: NumPy arrays by the NEFF's input names. Raises ValueError where nrtpy is not installed.
    """
    try:
        nrtpy = load("nrtpy")
        model_class, tensor_class = nrtpy.NrtpyModel, nrtpy.NrtpyTensor
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected nrtpy (Neuron 2.32 or newer) to be installed, got {error}; it cannot share "
            "an environment with nki"
        ) from error
    model = model_class.load_from_neff(str(neff))
    tensors = {name: tensor_class.from_numpy(x, name=name) for name, x in inputs.items()}
    samples = []
    for index in range(repeats):
        first = warmup if index == 0 else 0
        found = model.benchmark(tensors, warmup_iter=first, benchmark_iter=1, mode="device")
        samples.append(1e3 * found.mean_ms)
    return percentiles(samples, "device clock (nrtpy)")
