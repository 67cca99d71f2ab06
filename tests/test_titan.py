"""A TorchTitan-style model over several ranks is the same model, in TorchTitan's token order."""

import pytest
import torch
from budgets import assert_within_budget
from titan_style import Model, train_step
from torch import nn
from torch.distributed.tensor.experimental import _attention as torch_context_parallel

from nxd_cp import CPContext
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.integrations.titan import (
    LAYOUT_OF_LOAD_BALANCER,
    RingInnerAttention,
    replace_inner_attention,
)
from nxd_cp.schedule import token_runs

FIRST_STEP, LATER_STEPS = 1e-6, 1e-5
TEXT = load_text()


def _optimiser(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)


def _step(model, batch, cp):
    return train_step(model, _optimiser(model), batch, cp)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_our_zigzag_is_the_head_tail_order_of_torch(num_ranks):
    seq_len = 24 * num_ranks
    balancer = torch_context_parallel._HeadTailLoadBalancer(seq_len, num_ranks, "cpu")
    theirs = balancer._generate_indices().flatten()
    layout = LAYOUT_OF_LOAD_BALANCER["headtail"]
    runs = (
        run for rank in range(num_ranks) for run in token_runs(layout, num_ranks, rank, seq_len)
    )
    ours = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("balancer", LAYOUT_OF_LOAD_BALANCER)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_are_those_of_one_device(num_ranks, balancer):
    batch = sample_batch(TEXT, 96, 0, seed=0)
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        model = Model().to(dtype)
        CPContext.local(1).run(lambda cp, model=model: _step(model, batch, cp))
        gradients[dtype] = [parameter.grad for parameter in model.parameters()]

    def work(cp):
        model = Model()
        assert replace_inner_attention(model, cp) == 2
        _step(model, batch, cp)
        return [parameter.grad for parameter in model.parameters()]

    layout = LAYOUT_OF_LOAD_BALANCER[balancer]
    for rank in CPContext.local(num_ranks, layout=layout).run(work):
        for ours, truth, baseline in zip(
            rank, gradients[torch.float64], gradients[torch.float32], strict=True
        ):
            assert_within_budget("gradient", ours, truth, baseline)


def _train(num_ranks, num_steps=50):
    def work(cp):
        model = Model()
        replace_inner_attention(model, cp)
        optimiser = _optimiser(model)
        batches = (sample_batch(TEXT, 96, step, seed=0) for step in range(num_steps))
        return [train_step(model, optimiser, batch, cp) for batch in batches]

    return CPContext.local(num_ranks).run(work)[0]


def test_50_steps_of_training_are_those_of_one_rank():
    one = _train(1)
    assert one[-1] < one[0], "the model learns"
    for num_ranks in (2, 4):
        first, *later = _train(num_ranks)
        assert first == pytest.approx(one[0], rel=FIRST_STEP)
        assert later == pytest.approx(one[1:], rel=LATER_STEPS)


def test_local_attention_left_in_place_is_caught():
    batch = sample_batch(TEXT, 96, 0, seed=0)
    one = CPContext.local(1).run(lambda cp: _step(Model(), batch, cp))[0]
    local = CPContext.local(2).run(lambda cp: _step(Model(), batch, cp))[0]
    assert local != pytest.approx(one, rel=FIRST_STEP)


def test_a_second_swap_replaces_the_first():
    model = Model()
    assert replace_inner_attention(model, None, window=8) == 2
    assert replace_inner_attention(model, None) == 2
    assert model.layers[0].inner_attention.window is None


def test_what_would_be_dropped_raises():
    inner = RingInnerAttention(None)
    q, kv = torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="attention_masks: expected None, got object"):
        inner(q, q, q, attention_masks=object())
    with pytest.raises(ValueError, match="got score_mod"):
        inner(q, q, q, score_mod=abs)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        inner(q, kv, kv)
    with pytest.raises(ValueError, match="expected modules of class ScaledDotProductAttention"):
        replace_inner_attention(nn.Linear(2, 2), None)


def test_what_one_rank_alone_would_drop_raises_on_all():
    def work(cp):
        x = torch.ones(1, 4, 2, 16)
        masks = object() if cp.rank == 1 else None
        with pytest.raises(ValueError, match="attention_masks: expected None") as caught:
            RingInnerAttention(cp)(x, x, x, attention_masks=masks)
        return str(caught.value)

    first, second = CPContext.local(2, timeout_s=20).run(work)
    assert "rank 1 refuses: " in first
    assert "rank 1 refuses: " not in second
