"""What `nxd-cp profile` and `nxd-cp trace` do: time one of our kernels and show where it goes.

Does: run the kernel in the simulator on zeros, estimate, print or write. Does not: parse a command
line (nxd_cp/cli.py does).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from nxd_cp.simulators.cluster.measure import time_kernel

from . import plots, profile, trace
from .estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of attention on one core. generation: trn1, trn2, trn3 or gen2, gen3, gen4."""

    generation: str = "trn2"
    queries: int = 1024
    keys: int = 1024
    mask: str = "causal"
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"


def time_block(kernel: str, block: Block) -> Estimate:
    """Estimate of "flash_fwd" or "flash_bwd" on `block`; ValueError for what it cannot take."""
    if block.mask not in ("full", "causal", "strict"):
        raise ValueError(f"mask: expected full, causal or strict, got {block.mask!r}")
    if block.queries % 128 or block.keys % 128 or min(block.queries, block.keys) < 128:
        raise ValueError(
            f"queries and keys: expected multiples of 128, got {block.queries} and {block.keys}"
        )
    if block.mask != "full" and block.queries != block.keys:
        raise ValueError(
            f"queries and keys: expected equal lengths under a {block.mask} mask, "
            f"got {block.queries} and {block.keys}"
        )
    print(f"simulating {kernel} on {block.generation} ...", file=sys.stderr, flush=True)
    return time_kernel(
        kernel,
        block.generation,
        q_len=block.queries,
        k_len=block.keys,
        mask=block.mask,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        dtype=block.dtype,
    )


def run_profile(
    kernel: str,
    block: Block,
    *,
    json_path: Path | None = None,
    roofline: Path | None = None,
    timeline: Path | None = None,
) -> str:
    """The table of a kernel; also written as JSON, roofline PNG and timeline PNG when asked."""
    times = time_block(kernel, block)
    if json_path is not None:
        json_path.write_text(json.dumps(profile.summary(times), indent=1))
    if roofline is not None:
        plots.roofline_png(roofline, {kernel: times})
    if timeline is not None:
        plots.timeline_png(timeline, times.timeline)
    return profile.table(times)


def run_trace(kernel: str, block: Block, out: Path) -> str:
    """Write the Perfetto trace of a kernel to `out`; returns a line about it."""
    times = time_block(kernel, block)
    trace.write(out, {"rank 0 core 0": times.timeline})
    return (
        f"{out}: {len(times.timeline.program)} instructions, {times.expected_ns / 1e3:.1f} us "
        "estimated; open it at ui.perfetto.dev"
    )
