"""What `nxd-cp simulate` does: a ring on simulated chips, three levels, forward and backward.

Does: time the kernels, walk the ring, print a table and maybe write a trace. Does not: parse a
command line (nxd_cp/cli.py does).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from nxd_cp.schedule import make_plan
from nxd_cp.simulators.timing.constants import constants_for

from . import trace
from .kernel_time import KernelTime, Rate
from .measure import timed_kernel
from .ring import Model, RingTimes, closed_form_exposed_ns, simulate
from .topology import Cluster

LEVELS = {"low": "bound", "expected": "expected", "high": "pessimistic"}


@dataclass(frozen=True, kw_only=True)
class Ring:
    """What to simulate. tflops: sustained rate of a position; None times the kernels instead."""

    generation: str = "trn2"
    ranks: int = 8
    seq_len: int = 131072
    layout: str = "zigzag"
    causal: bool = True
    tensor_parallel: int = 4
    lnc: int = 2
    pods: bool = False
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    channels: int = 1
    tflops: float | None = None


def run_simulate(ring: Ring, *, trace_path: Path | None = None) -> str:
    """The table of a ring; ValueError for what cannot be."""
    if ring.tflops is not None and not 0 < ring.tflops < math.inf:
        raise ValueError(f"tflops: expected a positive number, got {ring.tflops:g}")
    if ring.num_heads % ring.num_kv_heads:
        raise ValueError(
            f"kv-heads: expected a divisor of {ring.num_heads} heads, got {ring.num_kv_heads}"
        )
    generation = constants_for(ring.generation).generation
    plan = make_plan(ring.layout, ring.ranks, ring.seq_len, causal=ring.causal)
    cluster = Cluster(
        generation=generation,
        num_positions=ring.ranks,
        tensor_parallel=ring.tensor_parallel,
        lnc=ring.lnc,
        pods=ring.pods,
    )
    model = Model(num_heads=ring.num_heads, num_kv_heads=ring.num_kv_heads, head_dim=ring.head_dim)
    links = sorted(set(cluster.hop_links())) or ["none"]
    out = [
        f"{ring.ranks} positions of {cluster.cores} {generation} cores "
        f"({cluster.chips:g} chips), {ring.seq_len} tokens, {ring.layout}, hops over "
        f"{', '.join(links)}; estimated, not measured",
        f"constants {constants_for(generation).note}",
        f"{'':<24}{'step ms':>10}{'compute ms':>12}{'exposed ms':>12}{'closed form':>13}"
        f"{'hop us':>10}{'balance':>9}{'efficiency':>12}{'guesses':>9}",
    ]
    for backward in (False, True):
        for level, name in LEVELS.items():
            kernel = _kernel(ring, generation, cluster, level, backward)
            times = simulate(
                plan,
                cluster,
                model,
                kernel,
                backward=backward,
                channels=ring.channels,
                level=level,
                progress=_progress,
            )
            direction = "backward" if backward else "forward"
            out.append(_line(f"{direction}, {name}", times, _closed_form(times, backward)))
            if trace_path is not None and not backward and level == "expected":
                trace.write(trace_path, plan, times)
                out.append(f"{'':<4}trace of the forward: {trace_path}")
    return "\n".join(out)


def _kernel(
    ring: Ring, generation: str, cluster: Cluster, level: str, backward: bool
) -> KernelTime:
    if ring.tflops is not None:
        factor = 10 if backward else 4
        return Rate(ring.tflops * 1e3, factor * ring.head_dim * ring.num_heads)
    if ring.num_heads % cluster.cores:
        raise ValueError(
            f"heads: expected a multiple of the {cluster.cores} cores of a position, "
            f"got {ring.num_heads}"
        )
    print(f"timing the kernels on {generation} ({LEVELS[level]}) ...", file=sys.stderr, flush=True)
    heads = ring.num_heads // cluster.cores
    groups = max(1, ring.num_kv_heads // cluster.cores)
    return timed_kernel(
        "flash_bwd" if backward else "flash_fwd",
        generation,
        heads_per_core=heads,
        kv_heads_per_core=min(groups, heads),
        head_dim=ring.head_dim,
        level=level,
    )


def _closed_form(times: RingTimes, backward: bool) -> str:
    """ms of a forward's exposed communication if all steps computed equally long; else a dash."""
    steps = len(times.hop_ns)
    if backward or not steps:
        return "-"
    hop = max(times.hop_ns)
    return f"{closed_form_exposed_ns(times.compute_ns / steps, hop, steps - 1) / 1e6:.3f}"


def _line(name: str, times: RingTimes, closed_form: str) -> str:
    hop = max(times.hop_ns, default=0.0)
    return (
        f"{name:<24}{times.total_ns / 1e6:>10.3f}{times.compute_ns / 1e6:>12.3f}"
        f"{times.exposed_ns / 1e6:>12.3f}{closed_form:>13}{hop / 1e3:>10.1f}{times.balance:>9.3f}"
        f"{100 * times.efficiency:>11.1f}%{100 * times.guess_share:>8.1f}%"
    )


def _progress(done: int, steps: int) -> None:
    if steps >= 64 and (done % 64 == 0 or done == steps):
        end = "\n" if done == steps else ""
        print(f"\rstep {done} of {steps}", end=end, file=sys.stderr, flush=True)
