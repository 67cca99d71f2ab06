"""The schedule, proved by expansion: every visible pair once, sends match receives."""

from __future__ import annotations

import dataclasses
import sys
from itertools import permutations, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_checks import (
    check_balance,
    check_bytes,
    check_moves,
    check_pairs,
    check_plan,
    check_strategy,
    every_plan,
)

from nxd_cp import documents
from nxd_cp.schedule import (
    LAYOUTS,
    Bounded,
    Move,
    Plan,
    Tile,
    make_plan,
    padded_len,
    seq_len_multiple,
)
from nxd_cp.strategies import Strategy, plan_strategy

SIZES = range(1, 9)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_visible_pair_is_computed_exactly_once(size: int, chunk: int) -> None:
    for plan in every_plan([size], chunk=chunk):
        check_plan(plan)
        check_balance(plan)


@pytest.mark.parametrize("size", range(1, 5))
def test_any_ring_order_computes_every_pair_and_matches_sends(size: int) -> None:
    for layout, order in product(LAYOUTS, permutations(range(size))):
        plan = make_plan(layout, size, 2 * seq_len_multiple(layout, size), ring_order=order)
        check_plan(plan)


@st.composite
def plans(draw: st.DrawFn, max_size: int = 16, max_local: int = 4) -> Plan:
    """Any layout, mask, ring order, number of queries and keys, divisible or not."""
    layout, size = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, max_size))
    num_tokens = draw(st.integers(1, max_local * size))
    num_kv_tokens = draw(st.one_of(st.just(num_tokens), st.integers(1, max_local * size)))
    causal = draw(st.booleans())
    ends = st.one_of(st.none(), st.integers(0, num_kv_tokens + 1))
    return make_plan(
        layout,
        size,
        padded_len(layout, size, num_tokens),
        kv_len=padded_len(layout, size, num_kv_tokens),
        num_tokens=num_tokens,
        num_kv_tokens=num_kv_tokens,
        causal=causal,
        window=(draw(ends), 0 if causal else draw(ends)),
        ring_order=tuple(draw(st.permutations(range(size)))),
    )


@settings(max_examples=300)
@given(plans())
def test_any_mask_and_lengths_on_up_to_16_ranks(plan: Plan) -> None:
    check_plan(plan)
    check_balance(plan)


@settings(max_examples=150)
@given(plans())
def test_any_mask_and_lengths_by_every_strategy_on_up_to_16_ranks(plan: Plan) -> None:
    check_strategy(plan_strategy(plan, Strategy("gather"), num_heads=2, num_kv_heads=2))
    for ways in (ways for ways in range(2, plan.size + 1) if plan.size % ways == 0):
        one = Strategy("heads", ways=ways)
        check_strategy(plan_strategy(plan, one, num_heads=plan.size, num_kv_heads=plan.size))


def test_a_strategy_that_loses_a_pair_a_row_or_a_place_is_caught() -> None:
    plan = make_plan("zigzag", 4, 16)
    gather = plan_strategy(plan, Strategy("gather"), num_heads=2, num_kv_heads=2)
    heads = plan_strategy(plan, Strategy("heads", ways=2), num_heads=4, num_kv_heads=4)
    move = gather.plan.steps[1][0].kv
    fewer = dataclasses.replace(move, into=(slice(0, 1),))
    groups = (heads.groups[1], *heads.groups[1:])
    for wrong in (
        dataclasses.replace(gather, plan=replace_step(gather.plan, 1, 1, tiles=())),
        dataclasses.replace(gather, plan=replace_step(gather.plan, 1, 0, kv=fewer)),
        dataclasses.replace(gather, plan=replace_step(gather.plan, 1, 1, grad=None)),
        dataclasses.replace(heads, plan=replace_step(heads.plan, 1, 1, tiles=())),
        dataclasses.replace(heads, groups=groups),
    ):
        with pytest.raises((AssertionError, KeyError)):
            check_strategy(wrong)


@settings(max_examples=150)
@given(plans(max_size=8), st.data())
def test_documents_spare_what_shows_nothing(plan: Plan, data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(0, plan.num_tokens), max_size=6))
    bounds = torch.tensor([0, *sorted(ends), plan.num_tokens])
    plan = make_plan(  # documents have as many keys as queries
        plan.layout,
        plan.size,
        plan.seq_len,
        num_tokens=plan.num_tokens,
        causal=plan.causal,
        window=(plan.left, plan.right),
        ring_order=plan.ring_order,
    )
    ids = documents.ids_of_ranks(bounds, plan, torch.device("cpu"))
    at = documents.ids_of_positions(bounds, torch.arange(plan.num_tokens)).tolist()
    check_plan(documents.spared(plan, ids), document=at.__getitem__)


@settings(max_examples=100)
@given(plans(max_size=6), st.data())
def test_ids_in_any_order_spare_what_shows_nothing(plan: Plan, data: st.DataObject) -> None:
    assume(plan.num_kv_tokens == plan.num_tokens)
    at = data.draw(st.lists(st.integers(-2, 3), min_size=plan.num_tokens, max_size=plan.num_tokens))
    padded = torch.tensor([*at, *[7] * (plan.seq_len - plan.num_tokens)])
    ids = [
        padded[documents.slot_positions(plan.layout, plan.size, rank, plan.seq_len)][None]
        for rank in range(plan.size)
    ]
    check_plan(documents.spared(plan, ids), document=at.__getitem__)


def test_documents_that_end_with_their_rank_send_nothing() -> None:
    plan = make_plan("contiguous", 4, 32)
    ids = documents.ids_of_ranks(torch.tensor([0, 8, 16, 24, 32]), plan, torch.device("cpu"))
    assert documents.spared(plan, ids).num_steps == 1
    assert plan.num_steps == 4
    assert documents.balance(plan, torch.tensor([0, 8, 16, 24, 32])) == (1.0,)
    assert documents.balance(plan, torch.tensor([0, 8, 32]))[1] > 1.0


@pytest.mark.parametrize("size", range(1, 9))
def test_contiguous_causal_keys_go_to_later_ranks_only(size: int) -> None:
    plan = make_plan("contiguous", size, 3 * size)
    sizes = {"batch": 1, "num_kv_heads": 1, "head_dim": 1, "itemsize": 4}
    sent = [plan.traffic(rank, **sizes).forward_messages for rank in range(size)]
    assert sent == [min(rank + 1, size - 1) if rank < size - 1 else 0 for rank in range(size)]


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


@given(*[st.integers(-9, 9)] * 2, *[st.integers(1, 8)] * 2)
def test_pairs_of_a_band_are_counted_as_they_are(low: int, wide: int, rows: int, keys: int) -> None:
    band = Bounded(low, low + abs(wide))
    assert band.num_pairs(rows, keys) == sum(len(band.columns(row, keys)) for row in range(rows))


def test_wrong_bytes_and_a_wrong_balance_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    contiguous = make_plan("contiguous", 3, 12)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["nxd_cp.schedule.plan"], "HEADER_BYTES", 0)
        with pytest.raises(AssertionError):
            check_bytes(contiguous)
    with monkeypatch.context() as patch:
        patch.setattr(Tile, "num_pairs", property(lambda tile: tile.q_len * tile.k_len))
        with pytest.raises(AssertionError):
            check_balance(make_plan("striped", 3, 12))
    check_bytes(contiguous)


ALL = (slice(0, 4),)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv": None},
        {"kv": Move(to=2, source=2, brings=2, out=ALL, into=ALL)},
        {"kv": Move(to=2, source=0, brings=2, out=(slice(0, 3),), into=ALL)},
        {"owner": 2},
        {"grad": None},
    ],
)
def test_a_dropped_or_wrong_hop_is_caught(changes: dict[str, object]) -> None:
    with pytest.raises((AssertionError, KeyError, AttributeError)):
        check_moves(replace_step(make_plan("zigzag", 3, 12), 1, 1, **changes))
