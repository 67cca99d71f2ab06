"""Ranks that disagree, are late, fail or die: an error on every rank, in bounded time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Failure, RankGroup

from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import Move
from nxd_cp.transport import LocalTransport, RingError

GROUP_TIMEOUT_S = 3.0
BOUND_S = 20.0


@pytest.fixture
def own_ranks() -> Iterator[RankGroup]:
    """Three ranks for one test, with a short group timeout; they may be broken."""
    group = RankGroup(3, group_timeout_s=GROUP_TIMEOUT_S, run_timeout_s=3 * BOUND_S)
    yield group
    group.close()


def attend(cp: CPContext, **change: Any) -> float:
    shape = change.pop("shape", (1, 4, 12, 16))
    dtype = change.pop("dtype", torch.float32)
    kv_heads = change.pop("kv_heads", 2)
    trains = change.pop("trains", True)
    q = torch.randn(shape, dtype=dtype, requires_grad=trains)
    k, v = (torch.randn(shape[0], kv_heads, *shape[2:], dtype=dtype) for _ in range(2))
    o = ring_attention(q, k, v, cp=cp, **change)
    if trains:
        o.sum().backward()
    return float(o.detach().sum())


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


def fail_on_rank_1(
    group: dist.ProcessGroup, how: str, messages: str = "p2p"
) -> tuple[str, str, float]:
    """Rank 1 fails within its second block; returns the others' first and second error."""
    cp = CPContext.from_group(group, messages=messages)
    attend(cp)
    right, blocks = TorchBackend.forward, iter(range(100))

    def fails(self: TorchBackend, *tensors: Any, **options: Any) -> Any:
        if cp.rank == 1 and next(blocks) == 1:
            if how == "dies":
                os._exit(17)
            if how == "sleeps":
                time.sleep(GROUP_TIMEOUT_S + 2)
            else:
                raise ZeroDivisionError("planted")
        return right(self, *tensors, **options)

    TorchBackend.forward = fails
    started = monotonic()
    texts = []
    for _ in range(2):
        try:
            attend(cp)
            texts.append("")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return *texts, monotonic() - started


@pytest.mark.parametrize("messages", ["p2p", "all_to_all"])
def test_a_killed_rank_ends_in_an_error_on_the_others(own_ranks: RankGroup, messages: str) -> None:
    outcomes = own_ranks.outcomes(fail_on_rank_1, "dies", messages)
    assert isinstance(outcomes[1], Failure)
    assert "17" in outcomes[1].text
    for first, second, seconds in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert "a rank is gone, late, or in another call" in first
        assert "cannot be used any more" in second
        assert seconds < GROUP_TIMEOUT_S + 4


def test_a_late_rank_ends_in_an_error_within_the_timeout(own_ranks: RankGroup) -> None:
    for first, second, seconds in own_ranks.outcomes(fail_on_rank_1, "sleeps"):
        assert first.startswith("RingError")
        assert "cannot be used any more" in second
        assert seconds < 2 * GROUP_TIMEOUT_S + 6


@pytest.mark.parametrize("messages", ["p2p", "all_to_all"])
def test_an_exception_in_one_block_ends_in_an_error_on_all(
    own_ranks: RankGroup, messages: str
) -> None:
    outcomes = own_ranks.outcomes(fail_on_rank_1, "raises", messages)
    assert outcomes[1][0].startswith("ZeroDivisionError: planted")
    for first, second, seconds in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert "cannot be used any more" in second
        assert seconds < GROUP_TIMEOUT_S + 4
    assert "cannot be used any more" in outcomes[1][1]


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


# Debug mode names what is wrong with the numbers themselves.


def nan_on_rank_1(group: dist.ProcessGroup, where: str) -> tuple[str, float]:
    """Rank 1 puts a NaN into its k; the error that is raised, and a call that works afterwards."""
    cp = CPContext.from_group(group)
    q, k = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16)
    if cp.rank == 1:
        k[0, 1, 2, 3] = torch.nan
    with debug(), pytest.raises(ValueError, match="got 1 NaN") as caught:
        ring_attention(q, k, q, cp=cp)
    return str(caught.value), attend(cp)


def test_a_nan_that_one_rank_would_send_is_named_on_all_ranks(ranks: RankGroup) -> None:
    for rank, (text, after) in enumerate(ranks.run(nan_on_rank_1, "k", num_ranks=3)):
        assert "k: expected numbers, got 1 NaN, the first at (0, 1, 2, 3)" in text
        assert ("rank 1 refuses: " in text) == (rank != 1)
        assert after == after, "the group is usable again"


def test_without_debug_mode_a_nan_travels() -> None:
    def work(cp: CPContext) -> bool:
        x = torch.ones(1, 1, 4, 16)
        v = torch.full_like(x, torch.nan) if cp.rank == 1 else x
        return bool(ring_attention(x, x, v, cp=cp, causal=False).isnan().any())

    assert CPContext.local(2).run(work) == [True, True]


def test_a_nan_in_gradients_names_its_sender_and_owner() -> None:
    def work(cp: CPContext) -> None:
        q, k = (torch.randn(1, 1, 4, 16, requires_grad=True) for _ in range(2))
        do = torch.full((1, 1, 4, 16), torch.nan if cp.rank == 1 else 1.0)
        o = ring_attention(q, k, k, cp=cp, causal=False)
        o.backward(do)

    with debug(), pytest.raises(RuntimeError, match=r"from rank 1 holds NaN \(grad of rank [01]\)"):
        CPContext.local(2).run(work)


def write_in_flight(cp: CPContext, writes: bool) -> None:
    left = (cp.rank - 1) % cp.size
    move = Move(to=(cp.rank + 1) % cp.size, source=left, brings=left)
    with cp.transport.call("test") as call:
        parcel = call.parcel("kv", (4,), torch.float32, torch.device("cpu"))
        parcel.payload.fill_(1.0)
        hop = call.start(parcel, move)
        if writes and cp.rank == 1:
            parcel.payload[2] = 5.0
        hop.wait()


def test_a_buffer_that_is_written_in_flight_is_caught_in_debug_mode() -> None:
    with debug():
        CPContext.local(2).run(lambda cp: write_in_flight(cp, False))
        with pytest.raises(RuntimeError, match=r"of rank 1\) was written while it was"):
            CPContext.local(2).run(lambda cp: write_in_flight(cp, True))


def gloo_write_in_flight(group: dist.ProcessGroup) -> tuple[str, str]:
    """The first error, and what the next call says."""
    cp, texts = CPContext.from_group(group), []
    with debug():
        for _ in range(2):
            try:
                write_in_flight(cp, True)
                texts.append("")
            except RuntimeError as error:
                texts.append(str(error))
    return texts[0], texts[1]


def test_after_a_write_in_flight_the_group_of_that_rank_says_that_it_is_broken(
    own_ranks: RankGroup,
) -> None:
    outcomes = own_ranks.run(gloo_write_in_flight)
    assert "was written while it was in flight" in outcomes[1][0]
    assert "cannot be used any more" in outcomes[1][1]


def test_a_rank_that_is_lost_while_a_hop_is_posted_ends_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(self: LocalTransport, *_: Any) -> None:
        raise RingError("planted")

    def work(cp: CPContext) -> str:
        with pytest.raises(RingError, match="planted"):
            attend(cp)
        with pytest.raises(RingError) as caught:
            attend(cp)
        return str(caught.value)

    monkeypatch.setattr(LocalTransport, "post", lost)
    for text in CPContext.local(2).run(work):
        assert "cannot be used any more" in text


def test_a_rank_that_is_lost_in_a_hop_of_others_ends_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_post, plain_complete = LocalTransport.post, LocalTransport.complete

    def post(self: LocalTransport, out: Any, into: Any, *rest: Any) -> Any:
        return None if out is into is None else plain_post(self, out, into, *rest)

    def lost(self: LocalTransport, ticket: Any) -> None:
        if ticket is None:
            raise RingError("planted")
        plain_complete(self, ticket)

    def work(cp: CPContext) -> str:
        with pytest.raises(RingError, match="a hop that carries nothing of this rank: planted"):
            attend(cp)
        with pytest.raises(RingError) as caught:
            attend(cp)
        return str(caught.value)

    monkeypatch.setattr(LocalTransport, "joins_every_hop", True)
    monkeypatch.setattr(LocalTransport, "post", post)
    monkeypatch.setattr(LocalTransport, "complete", lost)
    for text in CPContext.local(2).run(work):
        assert "cannot be used any more" in text


def test_an_error_in_a_block_while_no_hop_of_that_rank_is_under_way_ends_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks 0 and 2 share a document, so in step 0 rank 2 neither sends nor receives; in step 1 the
    keys of rank 0 come to it.
    """
    right, ids = TorchBackend.forward, torch.tensor([[5] * 12, [6] * 12, [5] * 12])

    def fails(self: TorchBackend, *tensors: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cp-rank-2":
            raise ZeroDivisionError("planted")
        return right(self, *tensors, **options)

    def work(cp: CPContext) -> str:
        text = ""
        for _ in range(2):
            try:
                attend(cp, segment_ids=ids[cp.rank : cp.rank + 1], trains=False)
            except (ZeroDivisionError, RingError) as error:
                text = str(error)
        return text

    monkeypatch.setattr(TorchBackend, "forward", fails)
    *_, text = CPContext.local(3, layout="contiguous").run(work)
    assert "cannot be used any more" in text
    assert "planted" in text


def lost_in_a_collective(group: dist.ProcessGroup, collective: str) -> list[str]:
    """Rank 1 dies within a collective that its ranks had agreed on; what the others see, twice."""
    cp = CPContext.from_group(group)
    if cp.rank == 1:
        setattr(dist, collective, lambda *arguments, **options: os._exit(17))
    texts = []
    for _ in range(2):
        try:
            getattr(cp, collective)(torch.ones(3))
            texts.append("")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_a_rank_lost_in_a_collective_ends_the_group(own_ranks: RankGroup, collective: str) -> None:
    started = monotonic()
    outcomes = own_ranks.outcomes(lost_in_a_collective, collective)
    for first, second in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert f"lost the others in {collective}: a rank is gone, late, or" in first
        assert "cannot be used any more" in second
    assert monotonic() - started < BOUND_S


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


def two_layers(cp: CPContext, swapped: bool) -> None:
    x = torch.randn(1, 4, 12, 16)
    if swapped:
        ring_attention(x.cos(), x, x, cp=cp)
        ring_attention(x.sin(), x, x, cp=cp)
    else:
        ring_attention(x.sin(), x, x, cp=cp)
        ring_attention(x.cos(), x, x, cp=cp)


def test_equal_layers_that_one_rank_swaps_are_caught_in_debug_mode() -> None:
    group = CPContext.local(3)
    with debug():
        group.run(lambda cp: two_layers(cp, False))
        with pytest.raises(ValueError, match=r"called from = test_faults.py:\d+ \(crc") as caught:
            group.run(lambda cp: two_layers(cp, cp.rank == 1))
    assert "on rank 0 and 2" in str(caught.value)
    group.run(lambda cp: two_layers(cp, cp.rank == 1))  # without debug nothing can tell them apart


def test_sinks_that_one_rank_has_otherwise_are_caught_in_debug_mode() -> None:
    def work(cp: CPContext, differs: bool) -> None:
        attend(cp, sinks=torch.full((4,), 1.0 + (differs and cp.rank == 1)))

    group = CPContext.local(3)
    with debug():
        group.run(lambda cp: work(cp, False))
        with pytest.raises(ValueError, match=r"sinks = given crc \w+ on rank 0 and 2, given crc"):
            group.run(lambda cp: work(cp, True))
