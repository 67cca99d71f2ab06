"""Time the attention kernels; the same as `nxd-cp bench`, from a clone.

    python scripts/bench_kernels.py --help

Prints what it ran on. Without a Neuron device the times are simulated, and labelled so.
"""

from __future__ import annotations

import this_clone  # noqa: F401

from nxd_cp.bench.cli import app

if __name__ == "__main__":
    app()
