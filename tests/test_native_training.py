"""A native model on a device mesh trains with the losses of one device: TP 2 x CP 2 and
CP 2 x DP 2, FSDP2 over data x context parallelism, 50 steps, uneven ignored labels, two
micro-batches per step, recomputed activations.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from native_llama import flat_name, make
from ranks import RankGroup
from tiny_llama import (
    MICRO_BATCHES,
    STEPS,
    Training,
    batch,
    optimiser,
    problems,
    train_one_device,
    weights,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from nxd_cp.context import CPContext
from nxd_cp.loss import token_mean_loss
from nxd_cp.sharding import shard_batch


def train(
    group: dist.ProcessGroup, sizes: tuple[int, int, int], num_steps: int, layout: str, fault: str
) -> Training:
    """One rank's training on a mesh of (dp, cp, tp); gradients are whole.

    fault: "" or "averaged twice", a forgotten factor.
    """
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp", "tp"))
    cp = CPContext.from_mesh(mesh, "cp", layout=layout)
    model = make(weights(), mesh, cp, recompute=True)
    adam = optimiser(list(model.parameters()))
    replicas, replica = mesh["dp"].size(), mesh["dp"].get_local_rank()
    found = Training([], {})
    for step in range(num_steps):
        adam.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for index in range(MICRO_BATCHES):
            part = shard_batch(batch(step, replica * MICRO_BATCHES + index), cp)
            labels = part.pop("labels").flatten()
            logits = model(**part)
            per_token = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").double()
            # FSDP averages over dp x cp: undo it for cp; over dp the mean is what we want.
            factor = 1 if fault == "averaged twice" else cp.size
            loss = token_mean_loss(per_token, labels, cp, grad_average_over=factor) / MICRO_BATCHES
            loss.backward()
            total += cp.all_reduce(loss.detach()) / factor
        dist.all_reduce(total, group=mesh.get_group("dp"))
        adam.step()
        found.losses.append(float(total) / replicas)
        if step == 0:
            found.gradients = {
                flat_name(name): p.grad.full_tensor() for name, p in model.named_parameters()
            }
    return found


@lru_cache(maxsize=4)
def one_device(num_steps: int, num_replicas: int) -> Training:
    return train_one_device(num_steps, num_replicas)


def check(
    ranks: RankGroup, sizes: tuple[int, int, int], num_steps: int, layout: str, fault: str = ""
) -> list[str]:
    """Everything that differs from one device, on any rank."""
    one = one_device(num_steps, sizes[0])
    return [
        said for x in ranks.run(train, sizes, num_steps, layout, fault) for said in problems(x, one)
    ]


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 1)], ids=["cp2-tp2", "dp2-cp2"])
def test_50_steps_on_a_mesh_are_those_of_one_device(
    ranks: RankGroup, sizes: tuple[int, int, int]
) -> None:
    assert check(ranks, sizes, STEPS, "zigzag") == []


@pytest.mark.parametrize("layout", ["striped", "contiguous"])
def test_four_ranks_of_other_layouts_begin_with_the_same_losses_and_gradients(
    ranks: RankGroup, layout: str
) -> None:
    assert check(ranks, (1, 4, 1), 3, layout) == []


def test_gradients_averaged_twice_are_caught(ranks: RankGroup) -> None:
    said = check(ranks, (2, 2, 1), 2, "zigzag", "averaged twice")
    assert any("first gradient of head" in one for one in said)
