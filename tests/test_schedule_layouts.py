"""What each layout makes of a plan: owners, balance, masks, traffic; bad plans are refused."""

from __future__ import annotations

import dataclasses

import pytest
from plan_checks import every_plan

from nxd_cp.schedule import LAYOUTS, Step, make_plan, seq_len_multiple, token_runs

SIZES = range(1, 9)


@pytest.mark.parametrize("size", range(2, 9))
def test_zigzag_is_balanced_at_every_step(size: int) -> None:
    plan = make_plan("zigzag", size, 12 * size)
    assert plan.balance() == (1.0,) * size
    assert make_plan("contiguous", size, 12 * size).balance()[1] > 1.0


@pytest.mark.parametrize("size", range(2, 9))
def test_zigzag_computes_two_full_half_chunks_after_the_first_step(size: int) -> None:
    half = 3
    plan = make_plan("zigzag", size, 2 * half * size)
    upper_rows, lower_keys = slice(half, 2 * half), slice(0, half)
    for steps in plan.steps:
        for step in steps[1:]:
            (tile,) = step.tiles
            assert tile.mask == "full"
            assert tile.q_len * tile.k_len == 2 * half * half
            assert tile.q.start <= upper_rows.start < upper_rows.stop == tile.q.stop
            assert tile.k.start == lower_keys.start < lower_keys.stop <= tile.k.stop


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "contiguous",
            [["causal", None, None], ["causal", "full", None], ["causal"] + 2 * ["full"]],
        ),
        (
            "striped",
            [["causal", "strict", "strict"], ["causal", "causal", "strict"], 3 * ["causal"]],
        ),
        ("zigzag", 3 * [["causal", "full", "full"]]),
    ],
)
def test_behaviour_of_each_rank_and_step(layout: str, expected: list[list[str | None]]) -> None:
    plan = make_plan(layout, 3, 12)
    found = [[step.tiles[0].mask if step.tiles else None for step in steps] for steps in plan.steps]
    assert found == expected


def test_step_zero_is_the_own_diagonal_and_covers_every_row() -> None:
    for plan in every_plan(SIZES, chunk=2):
        assert plan.local_tokens == (plan.local_len,) * plan.size
        for rank, steps in enumerate(plan.steps):
            assert steps[0].owner == rank
            assert [tile.q for tile in steps[0].tiles] == [slice(0, plan.local_len)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_owner_and_runs_ascend(layout: str, size: int) -> None:
    seq_len = 3 * seq_len_multiple(layout, size)
    held = [token_runs(layout, size, rank, seq_len) for rank in range(size)]
    per_rank = [[token for run in runs for token in run] for runs in held]
    assert sorted(token for mine in per_rank for token in mine) == list(range(seq_len))
    assert all(mine == sorted(mine) and len(mine) == seq_len // size for mine in per_rank)


def test_traffic_counts_messages_and_bytes() -> None:
    plan = make_plan("zigzag", 4, 64)
    traffic = plan.traffic(1, batch=2, num_kv_heads=3, head_dim=8, itemsize=2)
    elements = 2 * 2 * 3 * 16 * 8
    assert traffic.forward_messages == 3
    assert traffic.forward_bytes == 3 * (2 * elements + 64)
    assert traffic.backward_messages == 3 + 4
    assert traffic.backward_bytes == 3 * (2 * elements + 64) + 4 * (4 * elements + 64)
    alone = make_plan("zigzag", 1, 64).traffic(0, batch=2, num_kv_heads=3, head_dim=8, itemsize=2)
    assert dataclasses.astuple(alone) == (0, 0, 0, 0)


def test_the_table_says_who_computes_what() -> None:
    lines = make_plan("zigzag", 2, 8).table().splitlines()
    assert lines[0] == "zigzag, 2 ranks, 8 tokens (4 per rank), causal, ring 0 -> 1"
    assert " ".join(lines[3].split()) == "0 1 1 - 8 q[2:4] x k[0:4] full"
    assert " ".join(lines[5].split()) == "1 1 0 - 8 q[0:4] x k[0:2] full"
    assert "1.000  1.000" in lines[-1]
    assert "nothing" in make_plan("contiguous", 2, 8).table()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("spiral", 2, 8), "layout: expected one of contiguous, zigzag, striped, got 'spiral'"),
        (("zigzag", 2, 6), "multiple of 4 .*got 6"),
        (("striped", 3, 8), "multiple of 3 .*got 8"),
        (("contiguous", 2, 0), "positive multiple of 2"),
    ],
)
def test_bad_plans_are_refused(arguments: tuple[str, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_plan(*arguments)


def test_a_bad_ring_order_or_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"permutation of 0..2, got \(0, 1, 1\)"):
        make_plan("zigzag", 3, 12, ring_order=(0, 1, 1))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        token_runs("zigzag", 2, 2, 8)


def test_a_plan_is_made_once() -> None:
    assert make_plan("zigzag", 4, 32) is make_plan("zigzag", 4, 32)
    assert isinstance(make_plan("zigzag", 4, 32).steps[0][0], Step)
