"""How the memory of a rank falls with the number of ranks.

Each measurement runs in processes of its own (gloo, one thread each): a causal call over a whole
sequence of S tokens, cut over N = 1, 2 and 4 ranks. Reported is how far a rank's resident set rises
in a forward, and in a forward and backward, above what its inputs hold. The ring is also measured
at S / 2. One rank alone has no messages; "gather" is there for comparison: it does hold keys of all
ranks that it sees, one or two rounds of heads at a time.

    python scripts/bench_memory.py          # 5 minutes on two free cores

Exits with 1 unless, for "ring" and "heads" and both modes,
    N x rise differs over N from 2 on by at most --at-most (1.0 is exactly S / N),
    at most --growth-at-most times as much rises at S as at S / 2 (2 is linear, 4 is S squared),
and for "ring" a forward on the most ranks rises less than a K and V of the full length hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from itertools import product

import torch
from bench_peers import MODES, Ranks
from peers.measure import Problem
from rich.progress import Progress

MIB = 2**20
Rises = dict[tuple[str, str, int, int], float]  # by strategy, mode, ranks, S


def rise(size: int, strategy: str, problem: Problem, mode: str) -> float:
    """MiB of the rank that rises most."""
    ranks = Ranks(size)
    found = max(ranks.ask("growth", ("strategy", strategy), problem, mode)) / MIB
    ranks.close()
    return found


def measure(options: argparse.Namespace) -> Rises:
    """All rises; prints a line for each strategy, mode and length."""
    found: Rises = {}
    shape = (options.heads, options.kv_heads, options.head_dim)
    lengths = (options.seq_len, options.seq_len // 2)
    rows = list(product(options.strategies, options.modes, lengths))
    with Progress() as progress:
        task = progress.add_task("measuring", total=len(rows) * len(options.ranks))
        for strategy, mode, seq_len in rows:
            cells = []
            for size in options.ranks:
                x = rise(size, strategy, Problem(seq_len, *shape), mode)
                found[strategy, mode, size, seq_len] = x
                cells.append(f"{x:8.1f} (x N {size * x:6.1f})")
                progress.advance(task)
            line = f"{strategy:<8} {mode:<20} S {seq_len:<6} " + " ".join(cells)
            progress.console.print(line, highlight=False, soft_wrap=True)
    return found


def problems(found: Rises, options: argparse.Namespace) -> list[str]:
    """What is not as it should be."""
    said = []
    shared = [size for size in options.ranks if size > 1]
    for strategy, mode in product(set(options.strategies) - {"gather"}, options.modes):
        of = {size: found[strategy, mode, size, options.seq_len] for size in options.ranks}
        scaled = [size * of[size] for size in shared]
        if scaled and max(scaled) > options.at_most * min(scaled):
            said.append(f"{strategy}, {mode}: N x rise differs by {max(scaled) / min(scaled):.2f}")
        for size in options.ranks:
            growth = of[size] / found[strategy, mode, size, options.seq_len // 2]
            if growth > options.growth_at_most:
                said.append(f"{strategy}, {mode}, N = {size}: {growth:.2f} times that of S / 2")
    whole, most = whole_kv(options), max(options.ranks)
    forward = found.get(("ring", MODES[0], most, options.seq_len), 0.0)
    if most > 2 and forward >= whole:
        said.append(f"ring: {forward:.1f} MiB on {most} ranks, a full K and V are {whole:.1f} MiB")
    return said


def whole_kv(options: argparse.Namespace) -> float:
    """MiB of a K and V of the full length."""
    return 2 * options.kv_heads * options.seq_len * options.head_dim * 4 / MIB


def main() -> int:
    """Print the table; 1 where memory does not fall and grow as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ring", "gather", "heads"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--at-most", type=float, default=1.35)
    parser.add_argument("--growth-at-most", type=float, default=2.5)
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}; fp32, causal, "
        f"{options.heads} query and {options.kv_heads} key/value heads, head dim "
        f"{options.head_dim}; a full-length K and V is {whole_kv(options):.1f} MiB; rise of a "
        f"rank's resident set in MiB, on {options.ranks} ranks"
    )
    said = problems(measure(options), options)
    for one in said:
        print(f"NOT MET: {one}")
    print(f"limits: {options.at_most} over N, {options.growth_at_most} over S; {len(said)} not met")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
