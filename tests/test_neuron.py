"""Suites for a Neuron instance (`pytest -m neuron`) and for the vendor's compiler alone
(`pytest -m neuron_compile`). Elsewhere they are skipped, and the reason says what is missing.

Never run on a device so far. What they are made of is tested here without one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from nxd_cp.backends.device_ops import launch_cores
from nxd_cp.backends.neuron import KernelBackend, has_nki
from nxd_cp.bench import numerics
from nxd_cp.bench.cases import Case
from nxd_cp.bench.compiled import compile_launch, launches
from nxd_cp.bench.device import HostClockTimer, waiter
from nxd_cp.bench.implementations import OurKernels
from nxd_cp.doctor.machine import look
from nxd_cp.doctor.packages import find_all
from nxd_cp.doctor.tier import decide
from nxd_cp.simulators.attention_block import DTYPES, KERNELS, MASKS

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "ring_worker.py"
TARGETS = (("trn1", 1), ("trn2", 1), ("trn2", 2), ("trn3", 1), ("trn3", 2))  # and LNC
CASES = [
    Case(kernel, 256, 256, mask, 2, 1, dim, dtype)
    for kernel, mask, dim, dtype in product(KERNELS, MASKS, (64, 128), DTYPES)
]


@pytest.fixture(scope="module")
def device() -> str:
    """ "neuron" or "xla"; skips without a device, nki or torch-neuronx."""
    tier = decide(find_all(), look())
    if tier.backend != "nki":
        pytest.skip(
            f"needs a Neuron device with nki and torch-neuronx: {'; '.join(tier.reasons[:2])}"
        )
    return {"native": "neuron", "xla": "xla"}[tier.stack]


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skips where nki's compiler cannot be imported."""
    if not has_nki():
        pytest.skip("needs the nki and neuronx-cc wheels of AWS's index; no device is needed")
    try:
        importlib.import_module("nki.compiler.ncc_driver")
    except ImportError as error:
        pytest.skip(f"needs an nki with nki.compiler.ncc_driver (NKI 0.3 or newer): {error}")


@pytest.mark.neuron_compile
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("target", "cores"), TARGETS)
def test_every_kernel_compiles_for_every_target(
    compiler: None,
    target: str,
    cores: int,
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    ours = OurKernels(KernelBackend("nki", cores=cores), cores)
    found = [
        compile_launch(launch, target, str(case), tmp_path / str(index))
        for index, launch in enumerate(launches(case, ours))
    ]
    log = ROOT / "out" / "neuron_compile.jsonl"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as lines:
        for one in found:
            lines.write(json.dumps(asdict(one), default=str) + "\n")
    assert found
    assert [one.error for one in found if one.error] == []


@pytest.mark.neuron
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device_are_right(device: str, case: Case) -> None:
    found = numerics.check(case, _ours(), device)
    assert found.passed, found.text


def _ours() -> OurKernels:
    cores = launch_cores()
    return OurKernels(KernelBackend("nki", cores=cores), cores)


@pytest.mark.neuron
@pytest.mark.timeout(1800)
def test_a_launch_on_the_device_has_a_time(device: str) -> None:
    timer = HostClockTimer(device, waiter(device), warmup=2, repeats=3)
    times = timer.time(Case(queries=128, keys=128, num_heads=2), _ours())
    assert times.us["min"] > 0


@pytest.mark.neuron
@pytest.mark.timeout(1800)
def test_a_ring_of_two_ranks_on_the_device_is_right(device: str) -> None:
    _ring(device, "nki", timeout_s=1700)


def _ring(device: str, backend: str, timeout_s: float) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(WORKER), device, backend]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_worker_of_the_device_ring_works_on_a_cpu() -> None:
    printed = _ring("cpu", "torch", timeout_s=110)
    assert {line.split(",")[0] for line in printed.splitlines() if "dv: " in line} == {
        "rank 0 of 2",
        "rank 1 of 2",
    }


def test_the_suites_are_skipped_with_a_reason_where_nothing_is_installed() -> None:
    if has_nki():
        pytest.skip("nki is here: the suites run")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(
        [*command, "-m", "neuron or neuron_compile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "needs a Neuron device with nki and torch-neuronx: stack: no torch" in done.stdout
    assert "needs the nki and neuronx-cc wheels of AWS's index" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]
