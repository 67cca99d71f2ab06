"""How fast the NKI simulator is on this machine, in three figures.

    python scripts/bench_simulator.py [PATH_TO_NKI_LIBRARY]

1. A stream of [128 x 128] x [128 x 512] matmul, exp and copy in float32, against NumPy doing the
   same arithmetic with no checks: the goal is at most 1.4 times its time.
2. Shape-only mode (no arithmetic, every check, the whole log) on our flash forward kernel: at
   least 25,000 instructions per second.
3. nki-library's attention_cte, one head, 4096 x 4096, d 128, causal, from the clone given: under
   5 s; and in shape-only mode, 25,000 instructions per second (it places every tensor itself).
   Without a clone it is skipped, and says so.

Times are processor time, one BLAS thread, the best of several rounds. Exits with 1 if a goal is
missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import this_clone  # noqa: F401

from nxd_cp.simulators.nki_api import Kernel, SimParams, install, load, parameters, record
from nxd_cp.simulators.nki_api import isa as nisa
from nxd_cp.simulators.nki_api import language as nl

STEPS = 200
ROUNDS = 5
GOALS = {"stream": 1.4, "shape_only": 25_000, "attention_cte_s": 5.0}


def best(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least processor time in seconds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def stream(a, b):
    """STEPS times matmul, exp, copy."""
    stationary, moving = nl.ndarray((128, 128), nl.float32), nl.ndarray((128, 512), nl.float32)
    nisa.dma_copy(stationary, a)
    nisa.dma_copy(moving, b)
    product = nl.ndarray((128, 512), nl.float32, nl.psum)
    weights, copied = nl.ndarray((128, 512), nl.float32), nl.ndarray((128, 512), nl.float32)
    for _ in range(STEPS):
        nisa.nc_matmul(product, stationary, moving, accumulate=False)
        nisa.activation(weights, nl.exp, product)
        nisa.tensor_copy(copied, weights)
    out = nl.ndarray((128, 512), nl.float32, nl.shared_hbm)
    nisa.dma_copy(out, copied)
    return out


def bare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same arithmetic in NumPy."""
    product, weights, copied = (np.empty((128, 512), np.float32) for _ in range(3))
    for _ in range(STEPS):
        np.matmul(a.T, b, out=product)
        np.exp(product, out=weights)
        np.copyto(copied, weights)
    return copied


def measure_stream() -> float:
    """Simulated time over NumPy's."""
    rng = np.random.default_rng(0)
    a, b = (0.01 * rng.standard_normal((128, n), dtype=np.float32) for n in (128, 512))
    kernel = Kernel(stream, "gen3")
    assert np.array_equal(kernel(a, b), bare(a, b)), "the two compute different things"
    simulated, plain = best(lambda: kernel(a, b)), best(lambda: bare(a, b))
    ratio = simulated / plain
    print(
        f"stream          {simulated / STEPS * 1e6:8.1f} us per step simulated, "
        f"{plain / STEPS * 1e6:.1f} us NumPy: {ratio:.2f} times (goal {GOALS['stream']})"
    )
    return ratio


def instructions_per_second(call: Callable[[], object]) -> float:
    """In shape-only mode, with the log."""

    def once() -> None:
        with record():
            call()

    with parameters(SimParams(values=False)):
        with record() as log:
            call()
        return len(log) / best(once)


def measure_shape_only() -> float:
    """Instructions per second of our flash forward kernel in shape-only mode."""
    kernels = load("nxd_cp.kernels", generation="gen3")
    q, k, v = (np.zeros((1, 1, 2048, 128), ml_dtypes.bfloat16) for _ in range(3))
    rate = instructions_per_second(lambda: kernels.flash_fwd.flash_fwd(q, k, v, "causal", 0.125))
    print(f"shape only      {rate:8,.0f} instructions/s (goal {GOALS['shape_only']:,})")
    return rate


def measure_attention(clone: Path) -> tuple[float, float]:
    """Seconds of attention_cte, unmodified, and its instructions per second in shape-only mode."""
    sys.path.insert(0, str(clone / "src" / "nkilib_src"))
    os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = "gen3"
    install()
    from nkilib.core.attention.attention_cte import attention_cte

    rng = np.random.default_rng(0)
    size, head = 4096, 128
    q, k, v = (
        rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for shape in ((1, head, size), (1, head, size), (1, size, head))
    )
    options = {"scale": head**-0.5, "causal_mask": True, "tp_q": False, "tp_k": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = best(lambda: attention_cte(q, k, v, **options), rounds=2)
        rate = instructions_per_second(lambda: attention_cte(q, k, v, **options))
    print(f"attention_cte   {seconds:8.2f} s, 4096 x 4096, d 128, causal (goal 5)")
    print(f"  shape only    {rate:8,.0f} instructions/s (goal {GOALS['shape_only']:,})")
    return seconds, rate


def main() -> int:
    """Print the figures; 1 if one misses its goal."""
    parser = argparse.ArgumentParser(description="Speed of the NKI simulator.")
    parser.add_argument("library", nargs="?", type=Path, help="a clone of nki-library")
    clone = parser.parse_args().library
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, 1 thread used")
    reached = measure_stream() <= GOALS["stream"]
    reached = measure_shape_only() >= GOALS["shape_only"] and reached
    if clone is None:
        print("attention_cte   skipped: no clone of nki-library given")
    else:
        seconds, rate = measure_attention(clone)
        reached = seconds < GOALS["attention_cte_s"] and rate >= GOALS["shape_only"] and reached
    return 0 if reached else 1


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # BLAS reads it when NumPy is imported
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    raise SystemExit(main())
