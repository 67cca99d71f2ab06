"""Positions, document ids and RoPE tables of a rank are those of the whole sequence, cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from nxd_cp import (
    CPContext,
    position_ids,
    reference,
    ring_attention,
    rope_tables,
    segment_ids,
    shard,
    unshard,
)
from nxd_cp.schedule import LAYOUTS

CPU = torch.device("cpu")


@settings(max_examples=60)
@given(st.sampled_from(LAYOUTS), st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1))
def test_they_are_those_of_the_whole_sequence_cut(
    layout: str, size: int, lengths: list[int]
) -> None:
    lengths = [*lengths, 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    seq_len = sum(lengths)
    within = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert torch.equal(position_ids(seq_len), torch.arange(seq_len))
    assert torch.equal(position_ids(seq_len, cu_seqlens=cu_seqlens), within)
    assert torch.equal(segment_ids(cu_seqlens), ids)
    for cp in CPContext.local(size, layout=layout).contexts:
        for mine, whole in (
            (position_ids(seq_len, cp), torch.arange(seq_len)),
            (position_ids(seq_len, cp, cu_seqlens=cu_seqlens), within),
            (segment_ids(cu_seqlens, cp), ids),
        ):
            expected = shard(whole, cp, dim=0, pad_value=-1)
            held = expected >= 0
            assert mine.shape == expected.shape
            assert torch.equal(mine[held], expected[held])


def test_rope_tables_are_exact_far_out() -> None:
    positions = torch.tensor([0, 1, 2**20 + 1])
    cos, sin = rope_tables(positions, 8)
    for row, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / 8), dtype=torch.float64)
            assert cos[row, pair] == angle.cos().float()
            assert sin[row, pair] == angle.sin().float()
    wrong = (positions.float() * 1.0).mul(10000.0 ** (-2 / 8)).cos()
    assert (wrong[2] - cos[2, 1]).abs() > 1e-4, "angles in fp32 are not exact"


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotated_packed_attention_of_ranks_is_that_of_one_device(layout: str) -> None:
    """Every document attends as if it stood alone; 29 tokens on 3 ranks, padded with NaN."""
    cu_seqlens = torch.tensor([0, 7, 21, 29])
    q, k, v = (torch.randn(1, 2, 29, 16) for _ in range(3))
    alone, truth = [], []
    for first, stop in pairwise(cu_seqlens.tolist()):
        cos, sin = rope_tables(torch.arange(stop - first), 16)
        mine = slice(first, stop)
        one = (rotate(q[:, :, mine], cos, sin), rotate(k[:, :, mine], cos, sin), v[:, :, mine])
        alone.append(ring_attention(*one))
        exact = (x.double() for x in one)
        truth.append(reference.attention(*exact, mask="causal", scale=16**-0.5)[0])

    def work(cp: CPContext) -> torch.Tensor:
        cos, sin = rope_tables(position_ids(29, cp, cu_seqlens=cu_seqlens), 16)
        parts = [shard(x, cp, dim=2, pad_value=torch.nan) for x in (q, k, v)]
        q_local, k_local = (rotate(x, cos, sin) for x in parts[:2])
        o = ring_attention(q_local, k_local, parts[2], cp=cp, cu_seqlens=cu_seqlens, seq_len=29)
        return unshard(o, cp, dim=2, seq_len=29)

    for o in CPContext.local(3, layout=layout).run(work):
        assert_within_budget("o", o, torch.cat(truth, dim=2), torch.cat(alone, dim=2))


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([0, 5], "from 0 to 8"),
        ([1, 8], "from 0 to 8"),
        ([0, 6, 4, 8], "never fall"),
        ([0.0, 8.0], "expected an int32 or int64 tensor, got torch.float32"),
    ],
)
def test_lengths_that_do_not_fit_raise(ends: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        position_ids(8, cu_seqlens=torch.tensor(ends))


def test_bad_sizes_raise() -> None:
    with pytest.raises(ValueError, match="seq_len: expected a whole number of at least 1, got 0"):
        position_ids(0)
    with pytest.raises(ValueError, match="positive even number, got 7"):
        rope_tables(torch.arange(3), 7)
