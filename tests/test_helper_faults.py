"""Helpers that communicate: what one rank refuses, or asks for differently, ends on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import Tensor

from nxd_cp import loss
from nxd_cp.context import CPContext
from nxd_cp.loss import allreduce_grads, token_mean_loss
from nxd_cp.sharding import shard, shard_batch, unshard
from nxd_cp.transport import RankMismatchError

BOUND_S = 20.0  # a third of the timeout of the ranks' groups


def sum_losses(cp: CPContext, **change: Any) -> None:
    given = {"per_token": torch.ones(4), "labels": torch.ones(4).long(), "grad_average_over": 1}
    token_mean_loss(cp=cp, **(given | change))


def put_together(cp: CPContext, x: Any = None, **change: Any) -> None:
    unshard(torch.ones(2, 4) if x is None else x, cp, **change)


def reduce_gradients(cp: CPContext, shapes: Any = ((2, 3), (3, 2)), **change: Any) -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    sparse = change.pop("sparse", False)
    if sparse:
        params[0].grad = torch.ones(params[0].shape).to_sparse()
    allreduce_grads([*params, *change.pop("more", [])], cp, **change)


def gather(cp: CPContext, x: Any = None, **change: Any) -> None:
    cp.all_gather(torch.ones(2) if x is None else x, **change)


def reduce(cp: CPContext, x: Any = None, **change: Any) -> None:
    cp.all_reduce(torch.ones(2) if x is None else x, **change)


Helper = Callable[..., None]

REFUSALS: list[tuple[Helper, dict[str, Any], str]] = [
    (sum_losses, {"labels": torch.ones(3).long()}, "expected one loss per label, got [4] losses"),
    (sum_losses, {"labels": torch.ones(4)}, "got torch.float32 and torch.float32; losses come"),
    (sum_losses, {"labels": torch.ones(4).bool()}, "got torch.float32 and torch.bool; losses come"),
    (sum_losses, {"per_token": 1.0}, "per_token: expected a tensor, got float"),
    (sum_losses, {"grad_average_over": 0}, "a whole number of at least 1, got 0"),
    (sum_losses, {"grad_average_over": float("nan")}, "a whole number of at least 1, got nan"),
    (sum_losses, {"grad_average_over": True}, "a whole number of at least 1, got True"),
    (put_together, {"x": torch.ones(2, 4, requires_grad=True)}, "needs no gradient"),
    (put_together, {"x": torch.ones(2, 5)}, "expected a positive multiple of 6 (zigzag, 3 ranks)"),
    (put_together, {"x": [1, 2]}, "expected a tensor, got list"),
    (put_together, {"dim": 2}, "dim: expected the sequence dim of a tensor of 2 dims, got 2"),
    (put_together, {"dim": True}, "dim: expected the sequence dim of a tensor of 2 dims, got True"),
    (put_together, {"seq_len": 13}, "number of tokens: expected 1 to 12 (all slots), got 13"),
    (put_together, {"seq_len": 9.0}, "seq_len: expected a whole number or None, got 9.0"),
    (reduce_gradients, {"op": "max"}, 'op: expected "sum" or "mean", got \'max\''),
    (reduce_gradients, {"more": ["w"]}, "params: expected parameters, got str at 2"),
    (reduce_gradients, {"sparse": True}, "params: expected dense gradients, got torch.sparse_coo"),
    (gather, {"x": 1.5}, "all_gather: expected a tensor, got float"),
    (reduce, {"op": "max"}, "op: expected \"sum\", got 'max'"),
    (reduce, {"x": [1.5]}, "all_reduce: expected a tensor, got list"),
]

DIFFERENCES: list[tuple[Helper, dict[str, Any], str]] = [
    (sum_losses, {"grad_average_over": 3}, "grad_average_over = 1 on rank 0 and 2, 3 on rank 1"),
    (put_together, {"x": torch.ones(2, 6)}, "shape = [2, 4] on rank 0 and 2, [2, 6] on rank 1"),
    (put_together, {"seq_len": 11}, "seq_len = None on rank 0 and 2, 11 on rank 1"),
    (put_together, {"x": torch.ones(6, 6), "dim": 0}, "dim = 1 on rank 0 and 2, 0 on rank 1"),
    (reduce_gradients, {"op": "mean"}, "op = sum on rank 0 and 2, mean on rank 1"),
    (reduce_gradients, {"shapes": ((3, 2), (2, 3))}, "parameters = 2 (crc"),
    (reduce_gradients, {"shapes": ()}, "parameters = 2 (crc"),
    (reduce, {"x": torch.ones(3)}, "shape = (2,) on rank 0 and 2, (3,) on rank 1"),
]


def one_is_wrong(
    group: dist.ProcessGroup, helper: Helper, change: dict[str, Any]
) -> tuple[str, float]:
    """Rank 1 makes the wrong call, the others a right one; then all use the group again."""
    cp = CPContext.from_group(group)
    with pytest.raises(ValueError, match="expected") as caught:
        helper(cp, **(change if cp.rank == 1 else {}))
    helper(cp)
    return f"{type(caught.value).__name__}: {caught.value}", float(cp.all_reduce(torch.ones(())))


def test_what_one_rank_refuses_in_a_helper_all_refuse_at_once_and_say_who(
    ranks: RankGroup,
) -> None:
    started = monotonic()
    for helper, change, text in REFUSALS:
        outcomes = ranks.run(one_is_wrong, helper, change, num_ranks=3)
        for rank, (error, after) in enumerate(outcomes):
            assert text in error
            assert error.startswith("ValueError" if rank == 1 else "RankMismatchError")
            assert ("rank 1 refuses: " in error) == (rank != 1)
            assert after == 3.0, "the group is usable again"
    assert monotonic() - started < BOUND_S, "no rank waits for a timeout"


def test_what_one_rank_asks_of_a_helper_differently_is_named(ranks: RankGroup) -> None:
    for helper, change, text in DIFFERENCES:
        for error, after in ranks.run(one_is_wrong, helper, change, num_ranks=3):
            assert error.startswith("RankMismatchError")
            assert text in error
            assert after == 3.0, "the group is usable again"


def test_one_rank_in_another_helper_is_named() -> None:
    def work(cp: CPContext) -> str:
        with pytest.raises(RankMismatchError) as caught:
            (put_together if cp.rank == 1 else sum_losses)(cp)
        return str(caught.value)

    for text in CPContext.local(3).run(work):
        assert "helper = token_mean_loss on rank 0 and 2, unshard on rank 1" in text


def test_a_reduction_of_gradients_agrees_once_whatever_its_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "BUCKET_BYTES", 1)

    def work(cp: CPContext) -> int:
        reduce_gradients(cp)
        return cp.transport.counters.messages["agreement"]

    assert CPContext.local(3).run(work) == [2, 2, 2]


def test_cutting_sends_nothing_so_no_rank_waits_for_another() -> None:
    def work(cp: CPContext) -> list[Tensor]:
        if cp.rank == 1:
            return []
        batch = {"input_ids": torch.arange(12).view(1, 12), "labels": torch.arange(12).view(1, 12)}
        found = [shard(torch.arange(12), cp, 0), *shard_batch(batch, cp).values()]
        assert sum(cp.transport.counters.messages.values()) == 0
        return found

    assert [len(found) for found in CPContext.local(3).run(work)] == [4, 0, 4]
