"""A TorchTitan-style model over several ranks is the same model, in TorchTitan's token order."""

import pytest
import torch
from budgets import assert_within_budget
from torch import nn
from torch.distributed.tensor.experimental import _attention as torch_context_parallel
from torch.nn import functional as F

from nxd_cp import CPContext, allreduce_grads, shard_batch, token_mean_loss
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.demo.model import rope_tables, rotate
from nxd_cp.integrations.titan import (
    LAYOUT_OF_LOAD_BALANCER,
    RingInnerAttention,
    replace_inner_attention,
)
from nxd_cp.schedule import token_runs

FIRST_STEP, LATER_STEPS = 1e-6, 1e-5
TEXT = load_text()


class ScaledDotProductAttention(nn.Module):
    """The contract of TorchTitan's inner attention: [B, L, N, H] in and out, keywords alike."""

    def forward(self, q, k, v, *, attention_masks=None, scale=None, enable_gqa=False,
                is_causal=True, **kwargs):  # fmt: skip
        assert attention_masks is None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
        )
        return o.transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, dim=64, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.norm = nn.RMSNorm(dim)
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.inner_attention = ScaledDotProductAttention()

    def forward(self, x, rope):
        parts = self.wqkv(self.norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 2)
        cos, sin = (table.transpose(1, 2) for table in rope)
        o = self.inner_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)
        return x + self.wo(o.flatten(2))


class Model(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(2))
        self.head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens, positions):
        rope = rope_tables(positions, self.layers[0].head_dim)
        rope = tuple(table.to(self.head.weight.dtype) for table in rope)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope)
        return self.head(x)


def _model():
    """A new model with the same weights every time, also in threads."""
    generator = torch.Generator().manual_seed(0)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
    return model


def _loss(model, batch, cp):
    part = shard_batch(batch, cp)
    logits = model(part["input_ids"], part["position_ids"])
    per_token = F.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="none")
    return token_mean_loss(per_token, part["labels"], cp)


def _step(model, batch, cp):
    loss = _loss(model, batch, cp)
    loss.backward()
    allreduce_grads(model.parameters(), cp)
    return float(cp.all_reduce(loss.detach()))


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
        model = _model().to(dtype)
        CPContext.local(1).run(lambda cp, model=model: _step(model, batch, cp))
        gradients[dtype] = [parameter.grad for parameter in model.parameters()]

    def work(cp):
        model = _model()
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
        model = _model()
        replace_inner_attention(model, cp)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)
        losses = []
        for step in range(num_steps):
            optimiser.zero_grad()
            losses.append(_step(model, sample_batch(TEXT, 96, step, seed=0), cp))
            optimiser.step()
        return losses

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
    one = CPContext.local(1).run(lambda cp: _step(_model(), batch, cp))[0]
    local = CPContext.local(2).run(lambda cp: _step(_model(), batch, cp))[0]
    assert local != pytest.approx(one, rel=FIRST_STEP)


def test_a_second_swap_replaces_the_first():
    model = _model()
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
