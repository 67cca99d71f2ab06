"""A worker for torchrun: a ring of all ranks on a device, outputs and gradients against fp64.

    torchrun --nproc-per-node 2 tests/ring_worker.py neuron nki

On XLA: `xla nki`. On CPU: `cpu torch`. Prints one line per rank; a failure when an error is
too large.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from nxd_cp import CPContext, reference, ring_attention, shard
from nxd_cp.accuracy import error, over_budget

SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 1024, 4, 2, 64


def main(device: str, backend: str) -> None:
    """One rank."""
    if device == "neuron":
        os.environ.setdefault("NEURON_RT_VISIBLE_CORES", os.environ["LOCAL_RANK"])
        import torch_neuronx  # noqa: F401  registers the device
    if device == "xla":
        import torch_xla.distributed.xla_backend  # noqa: F401  registers the backend
    dist.init_process_group({"neuron": "neuron", "xla": "xla", "cpu": "gloo"}[device])
    world = dist.group.WORLD
    assert world is not None, "init_process_group makes the world group"
    if device == "xla":
        cp = CPContext.from_xla([list(range(dist.get_world_size()))], dist.get_rank())
    else:
        cp = CPContext.from_group(world, messages="probe")
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, h, SEQ_LEN, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    whole = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    truth = true_results([x.double() for x in whole])
    plain = one_device(whole)
    parts = [shard(x, cp, dim=2).to(device) for x in whole]
    leaves = [x.requires_grad_() for x in parts[:3]]
    o = ring_attention(*leaves, cp=cp, backend=backend)
    o.backward(parts[3])
    found = [o.detach(), *(x.grad for x in leaves)]
    problems, lines = [], []
    for name, x, expected, baseline in zip(
        ("o", "dq", "dk", "dv"), found, truth, plain, strict=True
    ):
        x, expected, baseline = x.cpu(), shard(expected, cp, dim=2), shard(baseline, cp, dim=2)
        said = over_budget(x, expected, baseline)
        lines.append(f"{name}: {error(x, expected)}")
        problems += [f"{name}: {said}"] if said else []
    print(f"rank {cp.rank} of {cp.size}, " + "; ".join(lines) + "\n", end="", flush=True)
    dist.destroy_process_group()
    if problems:
        raise SystemExit(f"rank {cp.rank}: {problems}")


def true_results(whole: list[torch.Tensor]) -> list[torch.Tensor]:
    """o, dq, dk, dv in fp64."""
    q, k, v, do = whole
    o, _ = reference.attention(q, k, v, mask="causal", scale=HEAD_DIM**-0.5)
    grads = reference.attention_backward(do, q, k, v, mask="causal", scale=HEAD_DIM**-0.5)
    return [o, *grads]


def one_device(whole: list[torch.Tensor]) -> list[torch.Tensor]:
    """o, dq, dk, dv by PyTorch's flash attention in bf16."""
    leaves = [x.clone().requires_grad_() for x in whole[:3]]
    o = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return [o.detach(), *torch.autograd.grad(o, leaves, whole[3])]


if __name__ == "__main__":
    main(*sys.argv[1:])
