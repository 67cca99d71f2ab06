"""The batch helper and the loss: NxD's unit cases, its own file, and gradients after averaging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from nxd_stand_ins import Optimizer, ParallelState, clone, real_module
from ranks import RankGroup
from torch import Tensor, nn
from torch.nn import functional as F

from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd import (
    get_batch_on_this_context_parallel_rank,
    shift_labels,
    token_mean_loss,
)
from nxd_cp.sharding import IGNORE_INDEX, unshard

KEYS = ("input_ids", "attention_mask", "labels")


@pytest.mark.parametrize("degree", [1, 2, 4, 8, 16])
def test_nxds_unit_case_of_batch_slicing_passes(degree: int) -> None:
    batch = {key: torch.ones(1, 4096) for key in KEYS}
    for cp in CPContext.local(degree, layout="contiguous").contexts:
        part = get_batch_on_this_context_parallel_rank(batch, cp)
        assert {key: list(part[key].shape) for key in KEYS} == {
            key: [1, 4096 // degree] for key in KEYS
        }


def batches() -> list[dict[str, Tensor | None]]:
    tokens = torch.arange(48).reshape(2, 24)
    return [
        {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)},
        {"input_ids": tokens, "labels": tokens.to(torch.int32), "extra": None},
        {"input_ids": tokens, "labels": tokens.to(torch.uint8), "row": torch.zeros(2, 1)},
        {"labels": tokens.float(), "features": torch.randn(2, 24, 3)},
    ]


@pytest.mark.parametrize("batch", batches(), ids=lambda batch: "-".join(batch))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_contiguous_parts_are_those_of_nxds_own_file(batch: dict[str, Any], size: int) -> None:
    state = ParallelState()
    for cp in CPContext.local(size, layout="contiguous").contexts:
        state.get_context_model_parallel_size = lambda cp=cp: cp.size
        state.get_context_model_parallel_rank = lambda cp=cp: cp.rank
        with real_module(clone(), "utils.batch_utils", parallel_state=state) as nxd:
            theirs = nxd.get_batch_on_this_context_parallel_rank(batch)
            shifted = nxd.shift_labels(batch)
        _assert_holds(get_batch_on_this_context_parallel_rank(batch, cp), theirs)
        _assert_holds(shift_labels(batch), shifted)


def _assert_holds(ours: Any, theirs: dict[str, Tensor | None]) -> None:
    for key, value in theirs.items():
        if value is None:
            assert ours[key] is None
        else:
            assert ours[key].dtype == value.dtype
            assert torch.equal(ours[key], value)


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_parts_of_every_layout_join_to_the_shifted_batch_with_global_positions(layout: str) -> None:
    batch = batches()[0]

    def work(cp: CPContext) -> dict[str, Tensor]:
        part = get_batch_on_this_context_parallel_rank(batch, cp)
        return {key: unshard(value, cp) for key, value in part.items()}

    for whole in CPContext.local(4, layout=layout).run(work):
        assert torch.equal(whole["input_ids"], batch["input_ids"])
        assert torch.equal(whole["labels"][:, :-1], batch["input_ids"][:, 1:])
        assert (whole["labels"][:, -1] == IGNORE_INDEX).all()
        assert torch.equal(whole["position_ids"], torch.arange(24).expand(2, 24))


def test_one_rank_gets_the_batch_itself_and_own_positions_are_kept() -> None:
    batch = batches()[0]
    (cp,) = CPContext.local(1).contexts
    assert get_batch_on_this_context_parallel_rank(batch, cp) is batch
    own = {"input_ids": batch["input_ids"], "position_ids": torch.full((2, 24), 7)}
    part = get_batch_on_this_context_parallel_rank(own, CPContext.local(2).contexts[0])
    assert (part["position_ids"] == 7).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": (0, slice(0, 2), 0)}, "expected ones, and zeros only at the end"),
        ({"attention_mask": (0, slice(4, 6), 0)}, "expected ones, and zeros only at the end"),
        ({"attention_mask": (0, slice(20, 24), 0)}, "expected ones, and zeros only at the end"),
    ],
)
def test_masks_that_would_change_the_result_are_refused(changes: dict[str, Any], text: str) -> None:
    batch = {key: value.clone() for key, value in batches()[0].items()}
    for key, (row, columns, value) in changes.items():
        batch[key][row, columns] = value
    cp = CPContext.local(2).contexts[0]
    with pytest.raises(ValueError, match=text):
        get_batch_on_this_context_parallel_rank(batch, cp)
    assert get_batch_on_this_context_parallel_rank(batch, cp, check_mask=False)


def test_right_padding_with_ignored_labels_is_taken() -> None:
    batch = {key: value.clone() for key, value in batches()[0].items()}
    batch["attention_mask"][0, 20:] = 0
    batch["labels"][0, 20:] = IGNORE_INDEX
    for cp in CPContext.local(2).contexts:
        get_batch_on_this_context_parallel_rank(batch, cp)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"loss_scale": torch.ones(2)}, r"loss_scale: expected \[batch, sequence, ...\]"),
        ({"input_ids": torch.ones(1, 6)}, "divisible|multiple"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, r"attention_mask: expected \[batch, seq"),
    ],
)
def test_entries_that_cannot_be_cut_are_refused(entry: dict[str, Tensor], text: str) -> None:
    batch = {"input_ids": torch.ones(1, 8), **entry}
    with pytest.raises(ValueError, match=text):
        get_batch_on_this_context_parallel_rank(batch, CPContext.local(2).contexts[0])


def gradients(group: dist.ProcessGroup, exact: bool, over_replicas: bool) -> Tensor:
    """The gradient that NxDOptimizer leaves on CP 2 x DP 2; every replica has its own labels."""
    state = ParallelState()
    state.initialize_model_parallel(tensor=1, context=2)
    cp = CPContext.from_nxd(parallel_state=state)
    replica = dist.get_rank() // 2
    weight = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    part = get_batch_on_this_context_parallel_rank(replica_batch(replica), cp)
    losses = per_token(weight, part["input_ids"], part["labels"])
    if exact:
        data = state.mine["data"] if over_replicas else None
        loss = token_mean_loss(losses, part["labels"], cp, data_parallel_group=data)
    else:
        loss = losses.sum() / (part["labels"] != IGNORE_INDEX).sum().clamp(min=1)
    loss.backward()
    Optimizer(torch.optim.SGD([weight], lr=0.0), state).step()
    return weight.grad


def replica_batch(replica: int) -> dict[str, Tensor]:
    tokens = (torch.arange(16).reshape(1, 16) * (3 + replica)) % 5
    labels = tokens.clone()
    labels[0, 2 : 7 - 4 * replica] = IGNORE_INDEX
    return {"input_ids": tokens, "labels": labels}


def per_token(weight: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = weight[tokens][..., None] * torch.arange(5, dtype=torch.float64)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def expected_gradient(over_replicas: bool) -> Tensor:
    weight = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    sums, counts = [], []
    for replica in (0, 1):
        batch = shift_labels(replica_batch(replica))
        sums.append(per_token(weight, batch["input_ids"], batch["labels"]).sum())
        counts.append((batch["labels"] != IGNORE_INDEX).sum())
    if over_replicas:
        loss = sum(sums) / sum(counts)
    else:
        loss = sum(s / n for s, n in zip(sums, counts, strict=True)) / 2
    loss.backward()
    return weight.grad


@pytest.mark.parametrize("over_replicas", [False, True])
def test_gradients_after_nxds_averaging_are_those_of_the_token_mean(
    ranks: RankGroup, over_replicas: bool
) -> None:
    expected = expected_gradient(over_replicas)
    tolerance = 64 * torch.finfo(torch.float64).eps * float(expected.abs().max())
    for found in ranks.run(gradients, True, over_replicas):
        assert float((found - expected).abs().max()) <= tolerance
    assert float((expected_gradient(not over_replicas) - expected).abs().max()) > 1e6 * tolerance


def test_nxds_mean_of_local_means_is_caught(ranks: RankGroup) -> None:
    expected = expected_gradient(False)
    for found in ranks.run(gradients, False, False):
        assert float((found - expected).abs().max()) > 1e-3
