"""What one rank process of `bench_peers.py` does on request, and how memory is read.

Does: check a peer against fp64, time it, or measure how far its resident memory rises. Does not:
start processes.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers.adapters import PEERS, Ours, Peer, Tensors

from nxd_cp import reference

KIB = 1024


@dataclass(frozen=True)
class Problem:
    """Causal attention in fp32 over [1, num_heads, seq_len, head_dim]."""

    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def inputs(self) -> Tensors:
        """q, k, v and do of the whole sequence; equal in every process."""
        generator = torch.Generator().manual_seed(1)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shape = (self.seq_len, self.head_dim)
        return [torch.randn(1, h, *shape, generator=generator) for h in heads]

    @property
    def name(self) -> str:
        kind = "MHA" if self.num_heads == self.num_kv_heads else "GQA"
        return f"{kind} {self.num_heads}:{self.num_kv_heads}"


def serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    """A rank: answers (command, peer, problem, mode) until it is sent None.

    peer: a name, or ("window", 1024) or ("strategy", "gather") for ours with that option.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    peers: dict[Any, Peer] = {}
    while (request := pipe.recv()) is not None:
        command, name, problem, mode = request
        if name not in peers:
            peers[name] = Ours(**dict([name])) if isinstance(name, tuple) else PEERS[name]()
        pipe.send(COMMANDS[command](peers[name], problem, mode))
    dist.destroy_process_group()


def run(peer: Peer, local: Tensors, mode: str) -> Tensors:
    """One forward, or forward and backward."""
    return [peer.forward(*local[:3])] if mode == "forward" else peer.both(*local)


def errors(peer: Peer, problem: Problem, mode: str) -> dict[str, float]:
    """Largest error of o, dq, dk and dv against fp64 over the whole sequence."""
    whole = problem.inputs()
    q, k, v, do = (x.double() for x in whole)
    scale = problem.head_dim**-0.5
    o, _ = reference.attention(q, k, v, mask="causal", scale=scale)
    truth = [o, *reference.attention_backward(do, q, k, v, mask="causal", scale=scale)]
    local = [peer.cut(x, problem.num_kv_heads) for x in whole]
    found = peer.both(*local)
    names = ("o", "dq", "dk", "dv")
    return {
        name: float((x.double() - peer.cut(y, problem.num_kv_heads)).abs().max())
        for name, x, y in zip(names, found, truth, strict=True)
    }


def span(peer: Peer, problem: Problem, mode: str) -> tuple[float, float]:
    """When this rank began and ended one run, on the clock that all processes share."""
    local = [peer.cut(x, problem.num_kv_heads) for x in problem.inputs()]
    dist.barrier()
    started = time.monotonic()
    run(peer, local, mode)
    return started, time.monotonic()


def growth(peer: Peer, problem: Problem, mode: str) -> int:
    """Bytes by which resident memory rises above what the inputs hold, at its peak."""
    small = Problem(64, problem.num_heads, problem.num_kv_heads, problem.head_dim)
    run(peer, [peer.cut(x, problem.num_kv_heads) for x in small.inputs()], mode)  # loads code
    local = [peer.cut(x, problem.num_kv_heads) for x in problem.inputs()]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # peak resident set := present
    before = _status("VmRSS")
    run(peer, local, mode)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"no {field} in /proc/self/status; memory is measured on Linux only")


COMMANDS = {"errors": errors, "span": span, "growth": growth}
