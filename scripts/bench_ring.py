"""Ring attention on N processes with one thread each against one process with N threads.

Both compute the same causal attention, forward and backward, over [1, H, S, D] in fp32; the one
process runs PyTorch's own flash attention on the whole sequence. Runs alternate A B A B on an
otherwise idle machine, since single runs differ by tens of per cent; reported is the ratio of the
median times and the spread of the ratios of neighbouring runs. Gradients are checked first.

    python scripts/bench_ring.py --seq-len 8192 16384 --pairs 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import this_clone  # noqa: F401
import torch
import torch.distributed as dist
from torch import Tensor

from nxd_cp import CPContext, ring_attention, shard

PAUSE_S = 0.5  # lets the idle threads of the other side stop spinning
CHECK_LEN = 512
CHECK_BOUND = 1e-4


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of the problem."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def inputs(self, seq_len: int) -> list[Tensor]:
        """q, k, v and do of the whole sequence; equal in every process."""
        generator = torch.Generator().manual_seed(1)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        return [torch.randn(1, h, seq_len, self.head_dim, generator=generator) for h in heads]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_backward(attention: Attention, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of q, k and v."""
    *leaves, do = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    attention(*leaves).backward(do)
    return [x.grad for x in leaves]


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's flash attention over the whole sequence."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def serve_one(shape: Shape, num_threads: int, pipe: Connection) -> None:
    """The one process: times whole-sequence attention on request."""
    torch.set_num_threads(num_threads)
    while (seq_len := pipe.recv()) is not None:
        tensors = shape.inputs(seq_len)
        pipe.send("ready")
        while pipe.recv() == "go":
            started = time.monotonic()
            forward_backward(whole, tensors)
            pipe.send((started, time.monotonic()))


def serve_rank(shape: Shape, rank: int, size: int, meeting: str, pipe: Connection) -> None:
    """One rank of the ring: checks its gradients once, then times its part on request."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    cp = CPContext.from_group(dist.group.WORLD)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, cp=cp)

    full = shape.inputs(CHECK_LEN)
    found = forward_backward(attention, [shard(x, cp, dim=2) for x in full])
    for mine, expected in zip(found, forward_backward(whole, full), strict=True):
        difference = float((mine - shard(expected, cp, dim=2)).abs().max())
        assert difference <= CHECK_BOUND, f"gradients differ by {difference:.1e}"
    while (seq_len := pipe.recv()) is not None:
        tensors = [shard(x, cp, dim=2) for x in shape.inputs(seq_len)]
        pipe.send("ready")
        while pipe.recv() == "go":
            dist.barrier()
            started = time.monotonic()
            forward_backward(attention, tensors)
            pipe.send((started, time.monotonic()))
    dist.destroy_process_group()


def ask(pipes: list[Connection], message: object) -> list[object]:
    """Send to all, then collect one answer from each."""
    for pipe in pipes:
        pipe.send(message)
    return [pipe.recv() for pipe in pipes]


def seconds(pipes: list[Connection]) -> float:
    """From the first start to the last end of one run."""
    time.sleep(PAUSE_S)
    spans = ask(pipes, "go")
    return max(end for _, end in spans) - min(start for start, _ in spans)


def compare(ring: list[Connection], one: list[Connection], seq_len: int, pairs: int) -> float:
    """Time `pairs` alternating runs, print a line for each, return the ratio of medians."""
    for side in (ring, one):
        ask(side, seq_len)
        seconds(side)  # warm-up
    times = [(seconds(one), seconds(ring)) for _ in range(pairs)]
    for side in (ring, one):
        for pipe in side:
            pipe.send("enough")
    ratios = sorted(alone / ringed for alone, ringed in times)
    for index, (alone, ringed) in enumerate(times):
        print(f"  pair {index + 1}: one process {alone:.3f} s, ring {ringed:.3f} s")
    ratio = median(alone for alone, _ in times) / median(ringed for _, ringed in times)
    print(
        f"S {seq_len}: ring / one process = {ratio:.3f} of its throughput (medians of {pairs} "
        f"pairs; single pairs {ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )
    return ratio


def main() -> int:
    """Start both sides, compare them at each length; 1 where a ratio is below --at-least."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--at-least", type=float, default=0.0, help="ratio below which to fail")
    options = parser.parse_args()
    shape = Shape(options.heads, options.kv_heads, options.head_dim)
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.2f}; causal, forward + backward, fp32, {options.heads} query and "
        f"{options.kv_heads} key/value heads, head dim {options.head_dim}; {options.ranks} ranks x "
        f"1 thread against 1 process x {options.ranks} threads",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        ends = [context.Pipe() for _ in range(options.ranks + 1)]
        targets = [
            (serve_rank, (shape, rank, options.ranks, meeting, ends[rank][1]))
            for rank in range(options.ranks)
        ]
        targets.append((serve_one, (shape, options.ranks, ends[-1][1])))
        processes = [
            context.Process(target=target, args=args, daemon=True) for target, args in targets
        ]
        for process, (_, theirs) in zip(processes, ends, strict=True):
            process.start()
            theirs.close()  # so that a dead child ends the wait for it
        pipes = [ours for ours, _ in ends]
        ratios = [compare(pipes[:-1], pipes[-1:], n, options.pairs) for n in options.seq_len]
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
    return int(min(ratios) < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
