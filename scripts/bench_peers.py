"""Ring attention of several libraries side by side, on this CPU, in one run.

Two processes of one thread each (JAX: one process with two host devices of one thread each), over
gloo, causal, fp32. In every round each library runs once, so that they share the machine's moods;
reported are medians over rounds and, per library, the median of the ratios ours / theirs of the
same round. Before that every library is checked against fp64, gradients too, and its errors stand
beside its times: a fast wrong gradient is not a peer. Memory: how far a rank's resident set rises
in one call, each measurement in processes of its own.

    python scripts/bench_peers.py --seq-len 4096 8192 16384 --rounds 5
    python scripts/bench_peers.py --jax-python ~/venv-jax/bin/python    # with ringattention in it

Optional installs: `pip install ring-attention-pytorch` (lucidrains), and for JAX, in a virtual
environment of its own, `pip install jax==0.4.30 "flax<0.9" "numpy<2.1" einops ringattention`.
Exits with 1 when a threshold is not met: --at-most (our median time over the best correct peer's,
in any row), --window-at-least (causal / window 1024, at the longest length) and --memory-at-most
(our forward growth over PyTorch's).
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

import torch
from peers.adapters import installed
from peers.measure import Problem, serve

SIZE = 2
MODES = ("forward", "forward + backward")
PAUSE_S = 0.2
CHECK_LEN = 1024
CORRECT = 1e-4  # largest error of a gradient that counts as right, unit-variance inputs
WINDOW = 1024


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
        print("jax:", self._answer())

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

    def __init__(self, names: list[str], jax_python: str | None) -> None:
        self.ranks = Ranks()
        self.jax = Jax(jax_python) if jax_python else None
        self.names = [*names, "jax"] if self.jax else names
        self.errors: dict[tuple[str, str], dict[str, float]] = {}

    def check(self, problem: Problem) -> None:
        """Every peer's largest errors at a small length."""
        print(f"\nlargest error against fp64, {problem.name}, S {problem.seq_len}:")
        for name in self.names:
            if name == "jax":
                found = self.jax.ask("errors", problem)
            else:
                both = self.ranks.ask("errors", name, problem, "")
                found = {key: max(one[key] for one in both) for key in both[0]}
            self.errors[problem.name, name] = found
            text = "  ".join(f"{key} {value:.1e}" for key, value in found.items())
            print(f"  {name:<16} {text}{'' if self.is_right(problem, name) else '   WRONG'}")

    def is_right(self, problem: Problem, name: str) -> bool:
        """Its gradients were right."""
        return max(self.errors[problem.name, name].values()) <= CORRECT

    def seconds(self, name: Any, problem: Problem, mode: str) -> float:
        """From the first start to the last end of one run."""
        time.sleep(PAUSE_S)
        if name == "jax":
            started, ended = self.jax.ask("span", problem, mode)
            return ended - started
        spans = self.ranks.ask("span", name, problem, mode)
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def row(self, problem: Problem, mode: str, rounds: int) -> float:
        """Time all peers in turn; print; return our time over that of the best correct peer."""
        times: dict[str, list[float]] = {name: [] for name in self.names}
        for name in self.names:  # not timed: compiles, touches memory
            if name == "jax":
                self.jax.ask("warm", problem, mode)
            else:
                self.seconds(name, problem, mode)
        for index in range(rounds):
            turn = self.names[index % len(self.names) :] + self.names[: index % len(self.names)]
            for name in turn:
                times[name].append(self.seconds(name, problem, mode))
        print(f"\n{problem.name}, S {problem.seq_len}, {mode}: median of {rounds} rounds")
        best = None
        for name in self.names:
            ratio = median(a / b for a, b in zip(times["ours"], times[name], strict=True))
            right = self.is_right(problem, name)
            print(
                f"  {name:<16} {median(times[name]):8.3f} s   ours / this {ratio:.3f}"
                f"{'' if right else '   (gradients wrong)'}",
                flush=True,
            )
            if not name.startswith("ours") and (right or mode == "forward"):
                best = ratio if best is None else max(best, ratio)
        return 0.0 if best is None else best

    def window(self, problem: Problem, rounds: int) -> float:
        """Our time for causal over that for a window, forward and backward, paired."""
        ratios = []
        for _ in range(rounds + 1):
            causal = self.seconds("ours", problem, MODES[1])
            ratios.append(causal / self.seconds(("window", WINDOW), problem, MODES[1]))
        ratio = median(ratios[1:])
        print(f"\n{problem.name}, S {problem.seq_len}: causal / window {WINDOW} = {ratio:.2f}")
        return ratio

    def close(self) -> None:
        """End all processes."""
        self.ranks.close()
        if self.jax:
            self.jax.close()


def memory(names: list[str], problem: Problem) -> float:
    """Print each peer's growth; return our forward growth over PyTorch's smaller one."""
    print(f"\nrise of a rank's resident set, {problem.name}, S {problem.seq_len}, MiB:")
    forward = {}
    for name in names:
        found = []
        for mode in MODES:
            ranks = Ranks()
            found.append(max(ranks.ask("growth", name, problem, mode)) / 2**20)
            ranks.close()
        forward[name] = found[0]
        print(
            f"  {name:<16} forward {found[0]:8.1f}   forward + backward {found[1]:8.1f}", flush=True
        )
    torchs = [value for name, value in forward.items() if name.startswith("torch")]
    return forward["ours"] / min(torchs) if torchs else 0.0


def main() -> int:
    """Check, time and weigh all peers; 1 where a threshold is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2], help="one per shape")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check-len", type=int, default=CHECK_LEN)
    parser.add_argument("--jax-python", help="interpreter with jax and ringattention")
    parser.add_argument("--peers", nargs="+", choices=installed(), default=installed())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--at-most", type=float, default=float("inf"))
    parser.add_argument("--window-at-least", type=float, default=0.0)
    parser.add_argument("--memory-at-most", type=float, default=float("inf"))
    options = parser.parse_args()
    names = options.peers
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.2f}; peers: {', '.join(names)}"
    )
    bench = Bench(names, options.jax_python)
    ratios = []
    for kv_heads in options.kv_heads:
        shape = (options.heads, kv_heads, options.head_dim)
        bench.check(Problem(options.check_len, *shape))
        for seq_len in options.seq_len:
            problem = Problem(seq_len, *shape)
            ratios += [bench.row(problem, mode, options.rounds) for mode in MODES]
    longest = Problem(max(options.seq_len), options.heads, options.kv_heads[0], options.head_dim)
    window = bench.window(longest, options.rounds)
    bench.close()
    rise = memory(names, longest) if options.memory else 0.0
    groups = [Problem(0, options.heads, kv_heads, 0) for kv_heads in options.kv_heads]
    ours_right = all(bench.is_right(group, "ours") for group in groups)
    print(
        f"\nworst row: ours / best correct peer {max(ratios):.3f} (limit {options.at_most}); "
        f"window {window:.2f} (limit {options.window_at_least}); forward memory over PyTorch's "
        f"{rise:.2f} (limit {options.memory_at_most}); our gradients "
        f"{'right' if ours_right else 'WRONG'}"
    )
    met = max(ratios) <= options.at_most and window >= options.window_at_least
    return int(not (met and rise <= options.memory_at_most and ours_right))


if __name__ == "__main__":
    sys.exit(main())
