"""The tiny Llama as NxD builds it: tensor parallel, sequence parallel inside each CP rank's part.

Hidden states are [S / CP / TP, B, E]. Before attention and MLP they are gathered over TP to
[S / CP, B, E], after them summed and scattered; the ring runs over CP, in the hook
`call_attn_impln`, which `convert` replaces. Vocabulary, heads and MLP are split over TP.
Source of the structure: the figure in Neuron's context-parallelism overview, and the Llama example
of NxD 0.18.0; no line is NxD's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny_llama import EPS, LAYERS, VOCABULARY, D, Weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nxd_cp.demo.model import rope_tables, rotate

# The dim of each weight that is cut over TP; norms are whole.
SPLIT = {"embed": 0, "head": 0, "q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}


class Gather(torch.autograd.Function):
    """[s, B, E] of every rank to [s * TP, B, E]; the gradient is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_and_scatter(grad, ctx.group), None


class SumAndScatter(torch.autograd.Function):
    """[S, B, E] partial sums to this rank's [S / TP, B, E] of the sum; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_and_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """The sum over ranks of what each of them uses alike; the gradient is each rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def sum_and_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def parallel_cross_entropy(
    logits: Tensor, targets: Tensor, start: int, group: dist.ProcessGroup
) -> Tensor:
    """Loss of each token from this rank's slice [..., start : start + n] of its logits."""
    top = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logits = logits - top
    total = Sum.apply(logits.exp().sum(-1), group)
    local = targets - start
    mine = (local >= 0) & (local < logits.shape[-1])
    picked = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return total.log() - Sum.apply(picked * mine, group)


class Norm(nn.Module):
    """RMSNorm on a slice of the tokens; its gradient is to be summed over TP."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class Attention(nn.Module):
    """Heads of this TP rank; the interface that `convert` knows."""

    def __init__(self, w: Weights, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.use_flash_attention = group, False
        self.q, self.k, self.v, self.o = (nn.Parameter(w[name]) for name in "qkvo")
        self.num_key_value_groups = self.q.shape[0] // self.k.shape[0]

    def call_attn_impln(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("the model was not converted")

    def forward(self, x_SBE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            (x_SBE @ w.T).unflatten(-1, (-1, D)).permute(1, 2, 0, 3)
            for w in (self.q, self.k, self.v)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        o_BHSD = self.call_attn_impln(q, k, v)
        return o_BHSD.permute(2, 0, 1, 3).flatten(2) @ self.o.T


class Layer(nn.Module):
    """Gather, attention, scatter; gather, MLP, scatter."""

    def __init__(self, w: Weights, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.norm_in, self.norm_mlp = Norm(w["norm_in"]), Norm(w["norm_mlp"])
        self.attention = Attention(w, group)
        self.gate, self.up, self.down = (nn.Parameter(w[name]) for name in ("gate", "up", "down"))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        h = Gather.apply(self.norm_in(x), self.group)
        x = x + SumAndScatter.apply(self.attention(h, rope), self.group)
        h = Gather.apply(self.norm_mlp(x), self.group)
        h = (F.silu(h @ self.gate.T) * (h @ self.up.T)) @ self.down.T
        return x + SumAndScatter.apply(h, self.group)


class Llama(nn.Module):
    """Loss of each token of this CP rank, [B, S / CP], equal on all its TP ranks."""

    def __init__(self, w: Weights, group: dist.ProcessGroup, recompute: bool) -> None:
        super().__init__()
        w = {name: split(name, value, group) for name, value in w.items()}
        self.group, self.recompute = group, recompute
        self.start = dist.get_rank(group) * (VOCABULARY // dist.get_world_size(group))
        self.embed, self.head = nn.Parameter(w["embed"]), nn.Parameter(w["head"])
        self.norm = Norm(w["norm"])
        self.layers = nn.ModuleList(
            Layer({n: w[f"layers.{i}.{n}"] for n in names_of_a_layer(w)}, group)
            for i in range(LAYERS)
        )

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        rope = rope_tables(position_ids, D)
        local = input_ids.T - self.start
        mine = (local >= 0) & (local < len(self.embed))
        x = self.embed[local.clamp(0, len(self.embed) - 1)] * mine[..., None]
        x = SumAndScatter.apply(x, self.group)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        logits = (Gather.apply(self.norm(x), self.group) @ self.head.T).transpose(0, 1)
        return parallel_cross_entropy(logits, labels.clamp(min=0), self.start, self.group)


def names_of_a_layer(w: Weights) -> list[str]:
    return [name.removeprefix("layers.0.") for name in w if name.startswith("layers.0.")]


def split(name: str, value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a whole weight."""
    dim = SPLIT.get(name.rpartition(".")[2])
    if dim is None:
        return value.clone()
    return value.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].clone()


def join(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of what the TP ranks hold."""
    dim = SPLIT.get(name.rpartition(".")[2])
    return parts[0] if dim is None else torch.cat(parts, dim)


def named_gradients(model: Llama) -> Weights:
    """Gradients under the names of `tiny_llama.weights`."""
    return {
        name.replace("attention.", "").removesuffix(".weight"): p.grad.clone()
        for name, p in model.named_parameters()
    }
