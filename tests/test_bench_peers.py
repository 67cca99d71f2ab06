"""The comparison with other libraries runs, checks gradients, and fails below its thresholds; and
the memory of a rank is measured.
"""

from __future__ import annotations

import json
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
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def test_a_threshold_that_cannot_be_met_ends_in_an_error_after_table_figures_and_picture(
    tmp_path: Path,
) -> None:
    figures, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    done = run("bench_peers.py", [*TINY, "--out", str(figures), "--png", str(picture)])
    assert done.returncode == 1, done.stderr
    assert "our gradients right" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stdout.count("torch-alltoall") == 4
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert {one["name"] for one in found["times"]} == {"ours", "torch-alltoall"}
    assert all(one["right"] for one in found["errors"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peers_without_ours_are_refused() -> None:
    done = run("bench_peers.py", ["--peers", "torch-alltoall"])
    assert done.returncode == 2
    assert "--peers: expected ours among them, got torch-alltoall" in done.stderr


def test_memory_of_a_rank_is_measured_and_its_growth_is_limited() -> None:
    shape = "--seq-len 2048 --heads 2 --kv-heads 1 --head-dim 64 --ranks 1 --strategies ring"
    limit = ["--modes", "forward", "--growth-at-most", "0.5"]
    done = run("bench_memory.py", [*shape.split(), *limit])
    assert done.returncode == 1, done.stderr
    rises = [float(x) for x in re.findall(r"(\d+\.\d) \(x N", done.stdout)]
    assert len(rises) == 2, "at S and S / 2"
    assert 0 < rises[0] < 64
    assert done.stdout.count("NOT MET: ring") == 1
