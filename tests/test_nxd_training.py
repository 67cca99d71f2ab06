"""An NxD-style Llama on TP 2 x CP 2 trains with the losses of one device: 50 steps, uneven ignored
labels, two micro-batches per step, recomputed activations.
"""

from __future__ import annotations

from functools import lru_cache
from unittest import mock

import pytest
import torch.distributed as dist
from nxd_llama import Llama, join, named_gradients
from nxd_stand_ins import Optimizer, ParallelState
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

from nxd_cp.integrations import nxd
from nxd_cp.integrations.nxd.state import shared_context


def train(
    group: dist.ProcessGroup, num_steps: int, layout: str, recompute: bool, fault: str
) -> Training:
    """One rank's training; gradients are those of its own shards, after the optimiser's averaging.

    fault: "" or what is done wrong on purpose.
    """
    state = ParallelState()
    state.initialize_model_parallel(tensor=2, context=2)
    with mock.patch("nxd_cp.nxd_place.load_parallel_state", return_value=state):
        cp = shared_context(layout, state)
        model = nxd.convert(Llama(weights(), state.mine["tensor"], recompute), layout=layout)
    adam = optimiser(list(model.parameters()))
    wrapped = Optimizer(adam, state)
    found = Training([], {})
    for step in range(num_steps):
        adam.zero_grad()
        loss_of_step = 0.0
        for index in range(MICRO_BATCHES):
            part = nxd.get_batch_on_this_context_parallel_rank(batch(step, index), cp)
            labels = part["labels"]
            if fault == "local positions":
                part = {**part, "position_ids": part["position_ids"] % labels.shape[1]}
            per_token = model(**part).double()
            if fault == "mean of means":
                loss = per_token[labels != -100].mean()
            else:
                loss = nxd.token_mean_loss(per_token, labels, cp)
            (loss / MICRO_BATCHES).backward()
            loss_of_step += float(cp.all_reduce(loss.detach())) / cp.size / MICRO_BATCHES
        wrapped.step()
        found.losses.append(loss_of_step)
        if step == 0:
            found.gradients = named_gradients(model)
    return found


@lru_cache(maxsize=4)
def one_device(num_steps: int) -> Training:
    return train_one_device(num_steps)


def check(ranks: RankGroup, num_steps: int, layout: str, recompute: bool, fault: str) -> list[str]:
    """Everything that differs from one device, on any rank."""
    found = ranks.run(train, num_steps, layout, recompute, fault)
    said = []
    for tensor_ranks in (found[0:2], found[2:4]):
        names = tensor_ranks[0].gradients
        whole = {n: join(n, [rank.gradients[n] for rank in tensor_ranks]) for n in names}
        for rank in tensor_ranks:
            said += problems(Training(rank.losses, whole), one_device(num_steps))
    return said


def test_50_steps_with_recomputed_activations_are_those_of_one_device(ranks: RankGroup) -> None:
    assert check(ranks, STEPS, "zigzag", True, "") == []


@pytest.mark.parametrize("layout", ["striped", "contiguous"])
def test_other_layouts_begin_with_the_same_losses_and_gradients(
    ranks: RankGroup, layout: str
) -> None:
    assert check(ranks, 3, layout, False, "") == []


@pytest.mark.parametrize("fault", ["mean of means", "local positions"])
def test_a_wrong_denominator_and_wrong_positions_are_caught(ranks: RankGroup, fault: str) -> None:
    assert any("step 0" in said for said in check(ranks, 2, "zigzag", False, fault))
