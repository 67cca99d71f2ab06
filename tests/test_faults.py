"""Ranks that disagree, or one of which refuses: an error on every rank that says who."""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import BOUND_S, RankGroup
from small_call import attend

from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext


def disagree(group: dist.ProcessGroup, calls: list[dict[str, Any]]) -> tuple[list[str], float]:
    """Rank 1 makes these calls, the others plain ones; then all make one that agrees."""
    cp = CPContext.from_group(group)
    errors = []
    for change in calls:
        try:
            attend(cp, **(change if cp.rank == 1 else {}))
            errors.append("")
        except ValueError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors, attend(cp)


DIFFERENCES = [
    ({"shape": (1, 4, 16, 16)}, "local sequence length = 12 on rank 0 and 2, 16 on rank 1"),
    ({"shape": (2, 4, 12, 16)}, "batch = 1 on rank 0 and 2, 2 on rank 1"),
    ({"dtype": torch.bfloat16}, "dtype = torch.float32 on rank 0 and 2, torch.bfloat16 on rank 1"),
    ({"kv_heads": 4}, "key/value heads = 2 on rank 0 and 2, 4 on rank 1"),
    ({"window": 9}, "left = None on rank 0 and 2, 8 on rank 1"),
    ({"softcap": 5.0}, "softcap = None on rank 0 and 2, 5.0 on rank 1"),
    ({"sinks": torch.zeros(4)}, "sinks = None on rank 0 and 2, given on rank 1"),
    ({"seq_len": 31}, "seq_len = None on rank 0 and 2, 31 on rank 1"),
    ({"cu_seqlens": torch.tensor([0, 36])}, "cu_seqlens = None on rank 0 and 2, 1 documents, crc"),
    ({"segment_ids": torch.zeros(1, 12).int()}, "segment_ids = None on rank 0 and 2, given on"),
    ({"causal": False}, "causal = True on rank 0 and 2, False on rank 1"),
    ({"trains": False}, "gradients = wanted on rank 0 and 2, not wanted on rank 1"),
    ({"scale": 0.5}, "scale = 0.25 on rank 0 and 2, 0.5 on rank 1"),
]


@pytest.mark.parametrize("calls_before", [0, 1])
def test_ranks_that_disagree_all_raise_and_say_who(ranks: RankGroup, calls_before: int) -> None:
    for change, text in DIFFERENCES:
        calls = [{}] * calls_before + [change]
        for errors, after in ranks.run(disagree, calls, num_ranks=3):
            assert errors[:-1] == [""] * calls_before
            assert errors[-1].startswith("RankMismatchError")
            assert text in errors[-1]
            assert after == after, "the group is usable again"


def test_ranks_that_disagree_raise_over_threads_too() -> None:
    def work(cp: CPContext) -> None:
        attend(cp, **({"causal": False} if cp.rank == 1 else {}))

    with pytest.raises(ValueError, match="causal = True on rank 0 and 2, False on rank 1"):
        CPContext.local(3).run(work)


REFUSALS = [
    ({"shape": (1, 4, 7, 16)}, "expected a multiple of 2"),
    ({"dtype": torch.float64}, "q: expected float32, bfloat16 or float16, got torch.float64"),
    ({"kv_heads": 3}, "expected key/value heads that divide query heads"),
    ({"scale": float("inf")}, "scale: expected a number from 1e-20 to 1000000.0, got inf"),
    ({"dropout_p": 0.5}, "dropout_p: expected 0.0, got 0.5"),
    ({"backend": "\N{SNOWMAN}" * 900}, "backend: expected one of torch"),
    ({"dropout_p": "\x01\\" * 900}, "dropout_p: expected 0.0, got"),
]


def test_what_one_rank_refuses_all_refuse_at_once_and_say_who(ranks: RankGroup) -> None:
    started = monotonic()
    for change, text in REFUSALS:
        outcomes = ranks.run(disagree, [{}, change], num_ranks=3)
        for rank, ((before, error), after) in enumerate(outcomes):
            assert before == ""
            assert text in error
            assert error.startswith("ValueError" if rank == 1 else "RankMismatchError")
            assert ("rank 1 refuses: " in error) == (rank != 1)
            assert after == after, "the group is usable again"
    assert monotonic() - started < BOUND_S, "no rank waits for a timeout"


def test_a_refusal_that_nobody_hears_is_still_the_error_that_is_raised() -> None:
    def work(cp: CPContext) -> None:
        if cp.rank == 1:
            attend(cp, dropout_p=0.5)

    with pytest.raises(ValueError, match="dropout_p: expected"):
        CPContext.local(2, timeout_s=5).run(work)


def test_a_refusal_that_is_not_told_is_caught(own_ranks: RankGroup) -> None:
    outcomes = own_ranks.outcomes(refuse_in_silence)
    assert [outcome.kind for outcome in outcomes] == ["RingError", "ValueError", "RingError"]


def refuse_in_silence(group: dist.ProcessGroup) -> float:
    CPContext.refuse = lambda *arguments: None
    cp = CPContext.from_group(group)
    return attend(cp, **({"dropout_p": 0.5} if cp.rank == 1 else {}))


def other_lengths(group: dist.ProcessGroup) -> str:
    cp = CPContext.from_group(group)
    ends = [0, 20 - cp.rank, 24]
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        attend(cp, cu_seqlens=torch.tensor(ends))
    return str(caught.value)


def test_other_document_lengths_are_named(ranks: RankGroup) -> None:
    for text in ranks.run(other_lengths, num_ranks=2):
        assert "cu_seqlens = 2 documents, crc " in text


def other_layout(group: dist.ProcessGroup) -> str:
    layout = "striped" if dist.get_rank(group) == 2 else "zigzag"
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        attend(CPContext.from_group(group, layout=layout))
    return str(caught.value)


def test_a_different_layout_is_named(ranks: RankGroup) -> None:
    for text in ranks.run(other_layout, num_ranks=3):
        assert "layout = zigzag on rank 0 and 1, striped on rank 2" in text


def other_ring_order(group: dist.ProcessGroup) -> str:
    order = (0, 2, 1) if dist.get_rank(group) == 2 else (0, 1, 2)
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        attend(CPContext.from_group(group, ring_order=order))
    return str(caught.value)


def test_a_different_ring_order_is_named(own_ranks: RankGroup) -> None:
    for text in own_ranks.run(other_ring_order):
        assert "ring order = (0, 1, 2) on rank 0 and 1, (0, 2, 1) on rank 2" in text


def backward_in_other_order(group: dist.ProcessGroup) -> str:
    cp = CPContext.from_group(group)
    tensors = [torch.randn(1, 2, 4, 16, requires_grad=True) for _ in range(2)]
    outputs = [ring_attention(x, x, x, cp=cp) for x in tensors]
    first = outputs[1 if cp.rank == 0 else 0]
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        first.sum().backward()
    return str(caught.value)


def test_backwards_in_a_different_order_are_named(ranks: RankGroup) -> None:
    for text in ranks.run(backward_in_other_order, num_ranks=2):
        assert "of forward call = 2 on rank 0, 1 on rank 1" in text


def other_check(group: dist.ProcessGroup) -> str:
    cp = CPContext.from_group(group, check_ranks=dist.get_rank(group) == 0)
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        attend(cp)
    return str(caught.value)


def test_ranks_that_check_and_ranks_that_do_not_are_named(ranks: RankGroup) -> None:
    for text in ranks.run(other_check, num_ranks=3):
        assert "check_ranks = False on rank 1 and 2, True on rank 0" in text


def test_a_description_of_many_ranks_has_room() -> None:
    group = CPContext.local(40, ring_order=list(range(20, 40)) + list(range(20)))
    ends = torch.tensor([0, 39, 79])
    group.run(
        lambda cp: attend(
            cp, shape=(1, 4, 2, 16), cu_seqlens=ends, seq_len=79, softcap=3e4 / 7, window=12345
        )
    )


def test_the_ring_without_the_agreement_check_sends_one_agreement() -> None:
    def work(cp: CPContext) -> int:
        attend(cp)
        return cp.transport.counters.messages["agreement"]

    assert CPContext.local(2).run(work) == [2, 2]
    assert CPContext.local(2, check_ranks=False).run(work) == [1, 1], "in the first call only"


def test_a_backend_that_one_rank_cannot_make_is_refused_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str, device: torch.device) -> TorchBackend:
        if threading.current_thread().name == "cp-rank-1":
            raise ValueError("planted: not installed here")
        return TorchBackend()

    def work(cp: CPContext) -> str:
        with pytest.raises(ValueError, match="planted") as caught:
            attend(cp)
        return str(caught.value)

    monkeypatch.setattr(ops, "get_backend", missing)
    for rank, text in enumerate(CPContext.local(3, timeout_s=5).run(work)):
        assert ("rank 1 refuses: planted" in text) == (rank != 1)
