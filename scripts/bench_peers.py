"""Ring attention of several libraries side by side, on this CPU, in one run.

Two processes of one thread each (JAX: one process with two host devices of one thread each), over
gloo, causal, fp32. In every round each library runs once, so that they share the machine's moods;
reported are medians over rounds and, per library, the median of the ratios ours / theirs of the
same round. A library that takes more than twice our time in a first, untimed round is not a rival:
it runs in one round only. Before that every library is checked against fp64, gradients too, and its
errors stand beside its times: a fast wrong gradient is not a peer. Memory: how far a rank's
resident set rises in one call, each measurement in processes of its own.

    python scripts/bench_peers.py --out peers.json --png peers.png   # 16 minutes on two free cores
    python scripts/bench_peers.py --jax-python ~/venv-jax/bin/python    # with ringattention in it

Optional installs: `pip install ring-attention-pytorch` (lucidrains), and for JAX, in a virtual
environment of its own, `pip install jax==0.4.30 "flax<0.9" "numpy<2.1" einops ringattention`.
Exits with 1 when a threshold is not met: --at-most (our median time over the best correct peer's,
in any row), --window-at-least (causal / window 1024, at the longest length), --memory-at-most (our
forward growth over PyTorch's, in any row), and when our gradients are wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import this_clone  # noqa: F401
import torch
from peers.adapters import installed
from peers.measure import Problem, serve
from peers.table import Results
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

SIZE = 2
MODES = ("forward", "forward + backward")
PAUSE_S = 0.2
CHECK_LEN = 1024
WINDOW = 1024
SLOW = 2.0  # times our time: such a peer runs in one round only


class Ranks:
    """Rank processes that answer requests."""

    def __init__(self, size: int = SIZE) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, str(Path(self._folder.name) / "store"), theirs)
            self._processes.append(context.Process(target=serve, args=args, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def ask(self, command: str, name: Any, problem: Problem, mode: str) -> list[Any]:
        """All ranks' answers."""
        for pipe in self.pipes:
            pipe.send((command, name, problem, mode))
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        """End all."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()


class Jax:
    """The JAX peer, in another interpreter."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).parent / "peers" / "jax_ring.py"
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()

    def ask(self, command: str, problem: Problem, mode: str = "") -> Any:
        """Its answer to one request."""
        request = {"command": command, "problem": asdict(problem), "mode": mode}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the JAX process ended; see its message above")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


class Bench:
    """All peers, and the table of what they did."""

    def __init__(self, names: list[str], jax_python: str | None, progress: Progress) -> None:
        self.ranks = Ranks()
        self.jax = Jax(jax_python) if jax_python else None
        self.names = [*names, "jax"] if self.jax else names
        self.results = Results(progress.console.print)
        self._progress, self._task = progress, progress.add_task("peers", total=None)

    def expect(self, num_runs: int) -> None:
        """So many runs are to come."""
        self._progress.update(self._task, total=num_runs)

    def check(self, problem: Problem) -> None:
        """Every peer's largest errors at a small length."""
        for name in self.names:
            if name == "jax":
                found = self.jax.ask("errors", problem)
            else:
                both = self.ranks.ask("errors", name, problem, "")
                found = {key: max(one[key] for one in both) for key in both[0]}
            self.results.add_errors(problem, name, found)

    def seconds(self, name: Any, problem: Problem, mode: str) -> float:
        """From the first start to the last end of one run."""
        label = f"{problem.name}, S {problem.seq_len}, {mode}, {name}"
        self._progress.update(self._task, description=label)
        time.sleep(PAUSE_S)
        if name == "jax":
            started, ended = self.jax.ask("span", problem, mode)
        else:
            spans = self.ranks.ask("span", name, problem, mode)
            started, ended = min(start for start, _ in spans), max(end for _, end in spans)
        self._progress.advance(self._task)
        return ended - started

    def row(self, problem: Problem, mode: str, rounds: int) -> None:
        """Time all peers in turn, after a round that compiles and touches memory."""
        if self.jax:
            self.jax.ask("warm", problem, mode)
        first = {name: self.seconds(name, problem, mode) for name in self.names}
        rivals = [name for name in self.names if first[name] <= SLOW * first["ours"]]
        times: dict[str, list[float]] = {name: [] for name in self.names}
        for index in range(rounds):
            turn = rivals[index % len(rivals) :] + rivals[: index % len(rivals)]
            for name in turn if index else [*turn, *(set(self.names) - set(rivals))]:
                times[name].append(self.seconds(name, problem, mode))
        skipped = (len(self.names) - len(rivals)) * (rounds - 1)
        self._progress.advance(self._task, skipped)
        self.results.add_times(problem, mode, times)

    def window(self, problem: Problem, rounds: int) -> None:
        """Our time for causal over that for a window, forward and backward, paired."""
        ratios = []
        for _ in range(rounds + 1):
            causal = self.seconds("ours", problem, MODES[1])
            ratios.append(causal / self.seconds(("window", WINDOW), problem, MODES[1]))
        self.results.add_window(problem, WINDOW, median(ratios[1:]))

    def memory(self, problem: Problem, modes: tuple[str, ...]) -> None:
        """Each rival's growth: ours and PyTorch's."""
        for name in [name for name in self.names if name.startswith(("ours", "torch"))]:
            for mode in modes:
                label = f"{problem.name}, S {problem.seq_len}, memory, {name}"
                self._progress.update(self._task, description=label)
                ranks = Ranks()
                rise = max(ranks.ask("growth", name, problem, mode)) / 2**20
                ranks.close()
                self.results.add_memory(problem, mode, name, rise)
                self._progress.advance(self._task)

    def close(self) -> None:
        """End all processes."""
        self.ranks.close()
        if self.jax:
            self.jax.close()


def rounds_of(seq_len: int, asked: int) -> int:
    """Long runs need fewer: their times scatter less."""
    return min(asked, 3) if seq_len > 8192 else asked


def run(options: argparse.Namespace, progress: Progress) -> Results:
    """Check, time and weigh all peers."""
    bench = Bench(options.peers, options.jax_python, progress)
    shapes = [(options.heads, kv_heads, options.head_dim) for kv_heads in options.kv_heads]
    problems = [Problem(seq_len, *shape) for shape in shapes for seq_len in options.seq_len]
    longest = Problem(max(options.seq_len), *shapes[0])
    timed = sum(1 + rounds_of(one.seq_len, options.rounds) for one in problems)
    weighed = sum(name.startswith(("ours", "torch")) for name in bench.names)
    window = 2 * (1 + rounds_of(longest.seq_len, options.rounds))
    bench.expect(
        len(MODES) * timed * len(bench.names)
        + window
        + options.memory * weighed * (len(problems) + 1)
    )
    for shape in shapes:
        bench.check(Problem(options.check_len, *shape))
    for problem in problems:
        for mode in MODES:
            bench.row(problem, mode, rounds_of(problem.seq_len, options.rounds))
    bench.window(longest, rounds_of(longest.seq_len, options.rounds))
    bench.close()
    for problem in problems if options.memory else ():
        bench.memory(problem, MODES if problem == longest else MODES[:1])
    return bench.results


def main() -> int:
    """The command line; 1 where a threshold is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2], help="one per shape")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="at most 3 beyond S 8192")
    parser.add_argument("--check-len", type=int, default=CHECK_LEN)
    parser.add_argument("--jax-python", help="interpreter with jax and ringattention")
    parser.add_argument("--peers", nargs="+", choices=installed(), default=installed())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--at-most", type=float, default=1.05)
    parser.add_argument("--window-at-least", type=float, default=3.0)
    parser.add_argument("--memory-at-most", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--png", type=Path, help="draw them")
    options = parser.parse_args()
    if "ours" not in options.peers:
        parser.error(f"--peers: expected ours among them, got {' '.join(options.peers)}")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.2f}"
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *clocks) as progress:
        progress.console.print(f"{machine}; peers: {', '.join(options.peers)}", soft_wrap=True)
        results = run(options, progress)
    if options.out:
        results.write(options.out, machine)
    if options.png:
        results.draw(options.png, machine)
    limits = (options.at_most, options.window_at_least, options.memory_at_most)
    return int(not results.meets(*limits))


if __name__ == "__main__":
    sys.exit(main())
