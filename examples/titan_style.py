"""A TorchTitan-style model on a device mesh: swap the inner attention, cut the batch, train.

    torchrun --nproc-per-node 2 examples/titan_style.py

The model below is ordinary: its inner attention module takes q, k, v [B, L, N, H], as TorchTitan's
does. `replace_inner_attention` is the only line that knows of context parallelism.
"""

from typing import Annotated

import torch
import typer
from common import context, progress, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from nxd_cp import CPContext, allreduce_grads, shard_batch, token_mean_loss
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.demo.model import rope_tables, rotate
from nxd_cp.integrations.titan import LAYOUT_OF_LOAD_BALANCER, replace_inner_attention


class ScaledDotProductAttention(nn.Module):
    """Attention on one device, with TorchTitan's arguments."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: object = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
    ) -> Tensor:
        """o [B, L, N, H]."""
        assert attention_masks is None, "this model has no mask objects"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
        )
        return o.transpose(1, 2)


class Layer(nn.Module):
    """Grouped-query attention and a feed-forward block."""

    def __init__(self, dim: int, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.head_dim, self.parts = dim // heads, [heads, kv_heads, kv_heads]
        self.norms = nn.ModuleList([nn.RMSNorm(dim), nn.RMSNorm(dim)])
        self.wqkv = nn.Linear(dim, sum(self.parts) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim, bias=False), nn.SiLU(), nn.Linear(2 * dim, dim, bias=False)
        )
        self.inner_attention = ScaledDotProductAttention()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, L, E]; cos and sin [B, L, 1, H]."""
        qkv = self.wqkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(self.parts, 2)
        o = self.inner_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)
        x = x + self.wo(o.flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class Model(nn.Module):
    """Bytes in, logits out; every call makes the same weights."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(2))
        self.head = nn.Linear(dim, 256, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.05, generator=generator)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and GLOBAL positions, int64 [B, L]."""
        x = self.embed(tokens)
        tables = rope_tables(positions, self.layers[0].head_dim)
        cos, sin = (table.transpose(1, 2).to(x.dtype) for table in tables)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(x)


def train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, batch: dict[str, Tensor], cp: CPContext
) -> float:
    """One step over all ranks; returns the loss, equal on all of them."""
    part = shard_batch(batch, cp)
    logits = model(part["input_ids"], part["position_ids"])
    per_token = F.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="none")
    loss = token_mean_loss(per_token, part["labels"], cp)
    optimiser.zero_grad()
    loss.backward()
    allreduce_grads(model.parameters(), cp)
    optimiser.step()
    return float(cp.all_reduce(loss.detach()))


def main(
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence, over all ranks.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 20,
) -> None:
    """Train on a mesh with one axis, "cp"."""
    text = load_text()
    with context() as world:
        mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("cp",))
        cp = CPContext.from_mesh(mesh, "cp", layout=LAYOUT_OF_LOAD_BALANCER["headtail"])
        model = Model()
        replace_inner_attention(model, cp)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
        with progress(cp, steps, f"{cp.size} ranks") as advance:
            for step in range(steps):
                batch = sample_batch(text, seq_len, step, seed=0)
                loss = train_step(model, optimiser, batch, cp)
                advance(f"loss {loss:.4f}")
        if cp.rank == 0:
            print(f"last loss {loss:.6f}")


if __name__ == "__main__":
    run(main)
