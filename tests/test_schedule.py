"""The schedule, proved by expansion: every visible pair once, sends match receives, balance."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxd_cp.schedule import (
    LAYOUTS,
    Bounded,
    Move,
    Plan,
    Step,
    Tile,
    make_plan,
    seq_len_multiple,
    token_runs,
)

SIZES = range(1, 9)


def tokens(plan: Plan, rank: int) -> list[int]:
    runs = token_runs(plan.layout, plan.size, rank, plan.seq_len)
    return [position for run in runs for position in run]


def visible(tile: Tile, row: int, column: int) -> bool:
    if isinstance(tile.mask, Bounded):
        return row + tile.mask.low <= column <= row + tile.mask.high
    return {"full": True, "causal": column <= row, "strict": column < row}[tile.mask]


def pairs_computed(plan: Plan) -> Counter[tuple[int, int]]:
    """Global (query, key) pairs of all tiles of all ranks, with how often each is computed."""
    found: Counter[tuple[int, int]] = Counter()
    for rank in range(plan.size):
        mine = tokens(plan, rank)
        for step in plan.steps[rank]:
            theirs = tokens(plan, step.owner)
            for tile in step.tiles:
                for row, q in enumerate(mine[tile.q]):
                    for column, k in enumerate(theirs[tile.k]):
                        if visible(tile, row, column):
                            found[q, k] += 1
    return found


def check_pairs(plan: Plan) -> None:
    reach = plan.seq_len if plan.window is None else plan.window
    expected = {
        (q, k)
        for q, k in product(range(plan.seq_len), repeat=2)
        if q - reach < k <= q or not plan.causal
    }
    assert pairs_computed(plan) == Counter(dict.fromkeys(expected, 1))


def check_moves(plan: Plan) -> None:
    """Follow keys and gradients as data: who holds what after each step, and who is told so."""
    holds = {rank: rank for rank in range(plan.size)}
    grads = {rank: rank for rank in range(plan.size)}
    for index in range(plan.size):
        steps = [plan.steps[rank][index] for rank in range(plan.size)]
        assert [step.owner for step in steps] == [holds[rank] for rank in range(plan.size)]
        assert [step.owner for step in steps] == [grads[rank] for rank in range(plan.size)]
        holds = exchange([step.kv for step in steps], holds)
        grads = exchange([step.grad for step in steps], grads)
    assert grads == {rank: rank for rank in range(plan.size)}, "gradients come home"


def exchange(moves: list[Move | None], holds: dict[int, int]) -> dict[int, int]:
    if all(move is None for move in moves):
        return holds
    assert None not in moves, "either all ranks send or none"
    after = {}
    for rank, move in enumerate(moves):
        assert moves[move.to].source == rank, "a send has its receive"
        after[move.to] = holds[rank]
    for rank, move in enumerate(moves):
        assert after[rank] == move.brings
    return after


def every_plan(size: int, chunk: int) -> list[Plan]:
    return [
        make_plan(layout, size, chunk * seq_len_multiple(layout, size), causal=causal)
        for layout in LAYOUTS
        for causal in (True, False)
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_visible_pair_is_computed_exactly_once(size: int, chunk: int) -> None:
    for plan in every_plan(size, chunk):
        check_pairs(plan)


@pytest.mark.parametrize("size", SIZES)
def test_sends_match_receives_and_gradients_come_home(size: int) -> None:
    for plan in every_plan(size, 1):
        check_moves(plan)


@pytest.mark.parametrize("size", range(1, 5))
def test_any_ring_order_computes_every_pair_and_matches_sends(size: int) -> None:
    for layout, order in product(LAYOUTS, permutations(range(size))):
        plan = make_plan(layout, size, 2 * seq_len_multiple(layout, size), ring_order=order)
        check_pairs(plan)
        check_moves(plan)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(9, 16), st.integers(1, 2), st.booleans(), st.data())
def test_large_rings_hold_too(
    layout: str, size: int, chunk: int, causal: bool, data: st.DataObject
) -> None:
    order = tuple(data.draw(st.permutations(range(size))))
    seq_len = chunk * seq_len_multiple(layout, size)
    plan = make_plan(layout, size, seq_len, causal=causal, ring_order=order)
    check_pairs(plan)
    check_moves(plan)


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
    for plan in (plan for size in SIZES for plan in every_plan(size, 2)):
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


def replace_step(plan: Plan, rank: int, index: int, **changes: object) -> Plan:
    steps = [list(mine) for mine in plan.steps]
    steps[rank][index] = dataclasses.replace(steps[rank][index], **changes)
    return dataclasses.replace(plan, steps=tuple(tuple(mine) for mine in steps))


def test_a_wrong_mask_is_caught() -> None:
    plan = make_plan("striped", 2, 8)
    (tile,) = plan.steps[0][1].tiles
    wrong = replace_step(plan, 0, 1, tiles=(dataclasses.replace(tile, mask="causal"),))
    with pytest.raises(AssertionError):
        check_pairs(wrong)


def test_a_missing_tile_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_pairs(replace_step(make_plan("zigzag", 3, 12), 2, 1, tiles=()))


@pytest.mark.parametrize(
    "changes", [{"kv": None}, {"kv": Move(to=2, source=2, brings=2)}, {"owner": 2}, {"grad": None}]
)
def test_a_dropped_or_wrong_hop_is_caught(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        check_moves(replace_step(make_plan("zigzag", 3, 12), 1, 1, **changes))


def test_a_plan_is_made_once() -> None:
    assert make_plan("zigzag", 4, 32) is make_plan("zigzag", 4, 32)
    assert isinstance(make_plan("zigzag", 4, 32).steps[0][0], Step)
