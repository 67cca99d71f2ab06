"""The comparison with other libraries runs, checks gradients, and fails below its thresholds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = [
    "--seq-len",
    "64",
    "--rounds",
    "1",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--head-dim",
    "8",
    "--check-len",
    "64",
    "--no-memory",
    "--peers",
    "ours",
    "torch-alltoall",
    "--at-most",
    "0",
]


def test_a_threshold_that_cannot_be_met_ends_in_an_error_and_the_table_is_printed() -> None:
    command = [sys.executable, "scripts/bench_peers.py", *TINY]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "our gradients right" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stdout.count("torch-alltoall") == 4
