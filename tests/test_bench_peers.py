"""The comparison with other libraries runs, checks gradients, and fails below its thresholds; and
the memory of a rank is measured.
"""

from __future__ import annotations

import re
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


def run(script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/{script}", *arguments]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


def test_a_threshold_that_cannot_be_met_ends_in_an_error_and_the_table_is_printed() -> None:
    done = run("bench_peers.py", TINY)
    assert done.returncode == 1, done.stderr
    assert "our gradients right" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stdout.count("torch-alltoall") == 4


def test_memory_of_a_rank_is_measured() -> None:
    shape = "--seq-len 2048 --heads 2 --kv-heads 1 --head-dim 64 --ranks 1 --strategies ring"
    done = run("bench_memory.py", shape.split())
    assert done.returncode == 0, done.stderr
    rises = [float(x) for x in re.findall(r"(\d+\.\d) \(x N", done.stdout)]
    assert len(rises) == 2, "forward, and forward and backward"
    assert 0 < rises[0] < rises[1] < 64
