"""Loss and gradients of a split sequence are those of the whole one, however labels are spread."""

import pytest
import torch
from torch.nn import functional as F

from nxd_cp import loss as loss_module
from nxd_cp.context import CPContext
from nxd_cp.loss import allreduce_grads, token_mean_loss
from nxd_cp.schedule import LAYOUTS
from nxd_cp.sharding import IGNORE_INDEX, shard, shard_batch

SEQ_LEN, VOCABULARY = 24, 7
# fp64 all through: a few dozen additions in another order.
TOLERANCE = 64 * torch.finfo(torch.float64).eps


def _problem(ignored):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=generator)
    labels = tokens.clone()
    labels[ignored] = IGNORE_INDEX
    logits = torch.randn(2, SEQ_LEN, VOCABULARY, generator=generator, dtype=torch.float64)
    return {"input_ids": tokens, "labels": labels}, logits


def _ignored(kind):
    ignored = torch.zeros(2, SEQ_LEN, dtype=torch.bool)
    if kind == "uneven":
        ignored[0, : SEQ_LEN // 2] = True
        ignored[1, 5] = True
    elif kind == "a rank has none":
        ignored[:, : SEQ_LEN // 4 + 1] = True
    elif kind == "all":
        ignored[:] = True
    return ignored


def _whole_loss(batch, logits):
    logits = logits.clone().requires_grad_()
    labels = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = total / (labels != IGNORE_INDEX).sum().clamp(min=1)
    loss.backward()
    return loss.detach(), logits.grad


def _rank_loss(batch, logits, cp, average_over=1):
    part = shard_batch(batch, cp)
    local = shard(logits, cp).clone().requires_grad_()
    per_token = F.cross_entropy(local.flatten(0, 1), part["labels"].flatten(), reduction="none")
    loss = token_mean_loss(per_token, part["labels"], cp, grad_average_over=average_over)
    loss.backward()
    return loss.detach(), local.grad, cp


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["none", "uneven", "a rank has none", "all"])
def test_sum_over_ranks_is_the_loss_of_one_rank(layout, size, kind):
    batch, logits = _problem(_ignored(kind))
    expected, expected_grad = _whole_loss(batch, logits)
    ranks = CPContext.local(size, layout=layout).run(lambda cp: _rank_loss(batch, logits, cp))
    assert abs(sum(loss for loss, _, _ in ranks) - expected) <= TOLERANCE * max(1, expected)
    for _, grad, cp in ranks:
        apart = (grad - shard(expected_grad, cp)).abs().max()
        assert apart <= TOLERANCE


def test_a_mean_of_means_is_caught():
    batch, logits = _problem(_ignored("uneven"))
    expected, _ = _whole_loss(batch, logits)

    def mean_of_means(cp):
        labels = shard_batch(batch, cp)["labels"].flatten()
        return F.cross_entropy(shard(logits, cp).flatten(0, 1), labels) / cp.size

    wrong = sum(CPContext.local(2, layout="contiguous").run(mean_of_means))
    assert abs(wrong - expected) > 1e6 * TOLERANCE


def test_the_factor_undoes_averaging():
    batch, logits = _problem(_ignored("uneven"))
    expected, _ = _whole_loss(batch, logits)
    ranks = CPContext.local(4).run(lambda cp: _rank_loss(batch, logits, cp, average_over=4))
    assert abs(sum(loss for loss, _, _ in ranks) / 4 - expected) <= TOLERANCE * expected


def test_nan_at_an_ignored_token_stays_out():
    per_token = torch.tensor([1.0, torch.nan])
    labels = torch.tensor([3, IGNORE_INDEX])
    (loss,) = CPContext.local(1).run(lambda cp: token_mean_loss(per_token, labels, cp))
    assert loss == 1.0


def test_16_bit_losses_are_added_in_fp32():
    per_token = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    labels = torch.zeros(4096, dtype=torch.int64)
    (loss,) = CPContext.local(1).run(lambda cp: token_mean_loss(per_token, labels, cp))
    assert loss.dtype == torch.float32
    assert loss == 1.0


def test_bad_arguments_of_the_loss_raise():
    cp = CPContext.local(1)
    with pytest.raises(ValueError, match="one loss per label"):
        cp.run(lambda cp: token_mean_loss(torch.zeros(2), torch.zeros(3).long(), cp))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cp.run(lambda cp: token_mean_loss(torch.zeros(2), torch.zeros(2).long(), cp, 0))
    with pytest.raises(ValueError, match=r"got torch.int64 and torch.float32; losses come first"):
        cp.run(lambda cp: token_mean_loss(torch.zeros(2).long(), torch.zeros(2), cp))


def _parameters(rank):
    """Several dtypes, a parameter without gradient on some ranks, and one without on all."""
    params = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(5))]
    params.append(torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))
    params.append(torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    params.append(torch.nn.Parameter(torch.zeros(2)))
    for index in (0, 2):
        params[index].grad = torch.full_like(params[index], rank + 1.0)
    if rank == 1:
        params[1].grad = torch.arange(5.0)
    return params


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize(("op", "factor"), [("sum", 1.0), ("mean", 1 / 3)])
def test_gradients_are_reduced_in_buckets_of_any_size(monkeypatch, bucket_bytes, op, factor):
    monkeypatch.setattr(loss_module, "BUCKET_BYTES", bucket_bytes)

    def reduce(cp):
        params = _parameters(cp.rank)
        allreduce_grads(params, cp, op=op)
        return params

    for params in CPContext.local(3).run(reduce):
        assert torch.equal(params[0].grad, torch.full((3, 2), 6.0) * factor)
        assert torch.equal(params[1].grad, torch.arange(5.0) * factor)
        assert torch.equal(params[2].grad, torch.full((4,), 6.0 * factor, dtype=torch.bfloat16))
        assert params[3].grad is None
        assert params[4].grad is None


def test_a_parameter_that_is_given_twice_is_reduced_once(monkeypatch):
    monkeypatch.setattr(loss_module, "BUCKET_BYTES", 1)

    def reduce(cp):
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), cp.rank + 1.0)
        allreduce_grads([p, torch.nn.Parameter(torch.zeros(2)), p], cp)
        return p.grad

    for grad in CPContext.local(3).run(reduce):
        assert torch.equal(grad, torch.full((3,), 6.0))


def test_an_unknown_reduction_raises():
    with pytest.raises(ValueError, match='"sum" or "mean", got \'max\''):
        CPContext.local(1).run(lambda cp: allreduce_grads([], cp, op="max"))
