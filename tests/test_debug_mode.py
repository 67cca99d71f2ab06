"""Debug mode names NaN, buffers written in flight and swapped layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from small_call import attend

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import Move


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
        with pytest.raises(ValueError, match=r"from = test_debug_mode.py:\d+ \(crc") as caught:
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
