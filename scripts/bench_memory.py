"""How the memory of a rank falls with the number of ranks.

Each measurement runs in processes of its own (gloo, one thread each): a causal call over a whole
sequence of S tokens, cut over N = 1, 2 and 4 ranks. Reported is how far a rank's resident set rises
in a forward, and in a forward and backward, above what its inputs hold, and the bytes of one
full-length K and V for comparison. Where memory grows as S / N, N times the rise is the same for
every N from 2 on; one rank alone has no messages and rises less. "gather" and "heads" are shown
beside the ring: with "gather" ranks do hold other ranks' keys, one round of heads at a time.

    python scripts/bench_memory.py --seq-len 16384

Exits with 1 when N times the ring's rise differs over N from 2 on by a factor above --at-most.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch
from bench_peers import MODES, Ranks
from peers.measure import Problem

MIB = 2**20


def rise(size: int, strategy: str, problem: Problem, mode: str) -> float:
    """MiB of the rank that rises most."""
    ranks = Ranks(size)
    found = max(ranks.ask("growth", ("strategy", strategy), problem, mode)) / MIB
    ranks.close()
    return found


def main() -> int:
    """Print the table; 1 where the ring's rise does not fall as 1 / N."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ring", "gather", "heads"])
    parser.add_argument("--at-most", type=float, default=float("inf"))
    options = parser.parse_args()
    problem = Problem(options.seq_len, options.heads, options.kv_heads, options.head_dim)
    whole = 2 * options.kv_heads * options.seq_len * options.head_dim * 4 / MIB
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}; fp32, causal, "
        f"{options.heads} query and {options.kv_heads} key/value heads, head dim "
        f"{options.head_dim}, S {options.seq_len}; a full-length K and V is {whole:.1f} MiB"
    )
    print(f"{'strategy':<10} {'mode':<20} " + " ".join(f"{f'N = {n}':>18}" for n in options.ranks))
    worst = 0.0
    for strategy in options.strategies:
        for mode in MODES:
            found = [rise(size, strategy, problem, mode) for size in options.ranks]
            pairs = list(zip(options.ranks, found, strict=True))
            cells = [f"{x:8.1f} (x N {n * x:6.1f})" for n, x in pairs]
            print(f"{strategy:<10} {mode:<20} " + " ".join(cells), flush=True)
            if strategy == "ring":
                rises = [n * x for n, x in pairs if n > 1]
                worst = max(worst, max(rises, default=0.0) / max(min(rises, default=1.0), 1e-9))
    print(f"ring: N x rise differs by a factor of {worst:.2f} (limit {options.at_most})")
    return int(worst > options.at_most)


if __name__ == "__main__":
    sys.exit(main())
