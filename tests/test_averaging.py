"""Gradients over a mesh of data and context parallelism, by every way to reduce them, are those of
one device on the whole batch: our own sum, and the averages of DDP and FSDP.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nxd_cp import (
    CPContext,
    allreduce_grads,
    ring_attention,
    rope_tables,
    shard_batch,
    token_mean_loss,
)
from nxd_cp.sharding import IGNORE_INDEX

SEQ_LEN, VOCABULARY, WIDTH = 21, 11, 16  # 21 tokens: two ranks pad
TOLERANCE = 64 * torch.finfo(torch.float32).eps


class Model(nn.Module):
    """One layer of attention with sinks and RoPE."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.sinks = nn.Parameter(torch.zeros(2))
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, part: dict[str, Tensor], cp: CPContext | None) -> Tensor:
        x = self.mix(self.table(part["input_ids"]))
        q, k, v = x.unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        cos, sin = (t.unsqueeze(1) for t in rope_tables(part["position_ids"], WIDTH // 2))
        q, k = (rotate(x, cos, sin) for x in (q, k))
        o = ring_attention(q, k, v, cp=cp, sinks=self.sinks, seq_len=SEQ_LEN)
        return self.out(o.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def batch() -> dict[str, Tensor]:
    """Two sequences; ignored labels lie unevenly over sequences and ranks."""
    tokens = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    labels = tokens.clone()
    labels[0, :15] = IGNORE_INDEX
    labels[1, 3] = IGNORE_INDEX
    return {"input_ids": tokens, "labels": labels}


def one_device() -> dict[str, Tensor]:
    """Gradients of the mean loss over all valid tokens of both sequences."""
    model = Model()
    (cp,) = CPContext.local(1).contexts
    part = shard_batch(batch(), cp)
    per_token = F.cross_entropy(
        model(part, None).flatten(0, 1), part["labels"].flatten(), reduction="none"
    )
    (per_token.sum() / (part["labels"] != IGNORE_INDEX).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def local_loss(
    model: nn.Module, data: dict[str, Tensor], cp: CPContext, everyone: CPContext, average: int
) -> Tensor:
    """This rank's share: divided by the tokens of all ranks, of data and of context parallelism."""
    part = shard_batch(data, cp, pad=True)
    per_token = F.cross_entropy(
        model(part, cp).flatten(0, 1), part["labels"].flatten(), reduction="none"
    )
    return token_mean_loss(per_token, part["labels"], everyone, grad_average_over=average)


def on_a_mesh(group: dist.ProcessGroup, how: str) -> dict[str, Tensor]:
    """2 x 2 ranks: each pair shares one sequence."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "cp"))
    cp = CPContext.from_mesh(mesh, "cp")
    everyone = CPContext.from_group(group)
    row = mesh.get_local_rank("dp")
    data = {name: x[row : row + 1] for name, x in batch().items()}
    model: Any = Model()
    if how == "sum":
        local_loss(model, data, cp, everyone, 1).backward()
        allreduce_grads(model.parameters(), everyone)
    elif how == "mean over cp of sums over dp":
        local_loss(model, data, cp, everyone, 2).backward()
        allreduce_grads(model.parameters(), cp, op="mean")
        allreduce_grads(model.parameters(), CPContext.from_mesh(mesh, "dp"))
    elif how == "ddp":
        wrapped = DistributedDataParallel(copy.deepcopy(model), process_group=group)
        local_loss(wrapped, data, cp, everyone, 4).backward()
        model = wrapped.module
    elif how == "fsdp":
        fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("all",)))
        local_loss(model, data, cp, everyone, 4).backward()
        return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {name: p.grad for name, p in model.named_parameters()}


def check(found: list[dict[str, Tensor]]) -> None:
    expected = one_device()
    for grads in found:
        for name, grad in expected.items():
            assert float((grads[name] - grad).abs().max()) <= TOLERANCE * float(grad.abs().max())


@pytest.mark.parametrize("how", ["sum", "mean over cp of sums over dp", "ddp", "fsdp"])
def test_gradients_are_those_of_one_device(ranks: RankGroup, how: str) -> None:
    check(ranks.run(on_a_mesh, how))


def forgot_the_factor(group: dist.ProcessGroup) -> dict[str, Tensor]:
    cp = CPContext.from_group(group)
    wrapped = DistributedDataParallel(Model(), process_group=group)
    local_loss(wrapped, batch(), cp, cp, 1).backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters()}


def test_an_average_without_the_factor_is_caught(ranks: RankGroup) -> None:
    found = ranks.run(forgot_the_factor, num_ranks=2)
    with pytest.raises(AssertionError):
        check(found)
