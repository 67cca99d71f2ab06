"""The tiny Llama as a native PyTorch model: DTensor tensor parallelism with sequence parallelism,
FSDP2 over data x context parallelism, the ring over context parallelism.

The plan of `parallelize` follows the public TorchTitan recipe for Llama.
"""

from __future__ import annotations

import torch
from tiny_llama import EPS, HIDDEN, LAYERS, VOCABULARY, D, E, G, H, Weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.demo.model import rope_tables, rotate


class Attention(nn.Module):
    """Heads of this TP rank over the whole sequence."""

    def __init__(self, cp: CPContext) -> None:
        super().__init__()
        self.cp = cp
        self.q, self.o = nn.Linear(E, H * D, bias=False), nn.Linear(H * D, E, bias=False)
        self.k, self.v = (nn.Linear(E, G * D, bias=False) for _ in range(2))

    def forward(self, x_BSE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            projection(x_BSE).unflatten(-1, (-1, D)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        o_BHSD = ring_attention(rotate(q, *rope), rotate(k, *rope), v, cp=self.cp)
        return self.o(o_BHSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(E, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self, cp: CPContext) -> None:
        super().__init__()
        self.norm_in, self.norm_mlp = nn.RMSNorm(E, eps=EPS), nn.RMSNorm(E, eps=EPS)
        self.attention, self.mlp = Attention(cp), MLP()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm_in(x), rope)
        return x + self.mlp(self.norm_mlp(x))


class Llama(nn.Module):
    """Logits [B, S / CP, V] of this CP rank's tokens."""

    def __init__(self, cp: CPContext, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(VOCABULARY, E)
        self.layers = nn.ModuleList(Layer(cp) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(E, eps=EPS), nn.Linear(E, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        rope = rope_tables(position_ids, D)
        x = self.embed(input_ids)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        return self.head(self.norm(x))


def flat_name(name: str) -> str:
    """A parameter's name in `tiny_llama.weights`."""
    return name.replace(".attention.", ".").replace(".mlp.", ".").removesuffix(".weight")


def make(w: Weights, mesh: DeviceMesh, cp: CPContext, recompute: bool) -> Llama:
    """The model on a mesh (dp, cp, tp): the same weights everywhere, then cut."""
    model = Llama(cp, recompute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(w[flat_name(name)])
    if mesh["tp"].size() > 1:
        parallelize(model, mesh["tp"])
    shards = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.layers:
        fully_shard(layer, mesh=shards)
    return fully_shard(model, mesh=shards)


def parallelize(model: Llama, tp: DeviceMesh) -> None:
    """Heads, MLP and vocabulary over `tp`; tokens between them too."""
    top = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, tp, top)
    gathered = PrepareModuleInput(
        input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
    )
    plan = {
        "norm_in": SequenceParallel(),
        "norm_mlp": SequenceParallel(),
        "attention": gathered,
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers:
        parallelize_module(layer, tp, plan)
