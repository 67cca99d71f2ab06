"""The schedule, proved by expansion: every visible pair once, sends match receives, balance."""

from __future__ import annotations

import dataclasses
import sys
from itertools import permutations, product
from typing import Any

import plan_checks
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_checks import (
    Event,
    check_balance,
    check_bytes,
    check_every_order,
    check_moves,
    check_pairs,
    check_plan,
    check_progress,
    check_start_orders,
    check_strategy,
    check_strategy_progress,
    program,
)

from nxd_cp import documents
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.schedule import (
    LAYOUTS,
    Bounded,
    Move,
    Plan,
    Step,
    Tile,
    make_plan,
    padded_len,
    seq_len_multiple,
    token_runs,
)
from nxd_cp.strategies import Strategy, StrategyPlan, plan_strategy

SIZES = range(1, 9)


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


# Progress


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_order_of_events_blocks_with_unbuffered_sends(
    layout: str, size: int, backward: bool
) -> None:
    for window in (None, 5):
        plan = make_plan(layout, size, 4 * size, window=window, ring_order=None)
        states = check_every_order(plan, backward=backward)
        assert states > len(program(plan, 0, backward=backward)) or size == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_order_of_events_blocks_in_any_ring_order_of_four(layout: str) -> None:
    for order in permutations(range(4)):
        check_every_order(make_plan(layout, 4, 16, window=6, ring_order=order), backward=True)


STRATEGIES = [
    Strategy("ring"),
    Strategy("ring", heads_per_round=1),
    Strategy("gather"),
    Strategy("heads"),
    Strategy("heads", ways=2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_strategy_blocks_in_any_ring_order_and_start_order_of_up_to_four(layout: str) -> None:
    for size in range(2, 5):
        masks = [(True, None), (True, 5), (False, None), (False, (3, 2))]
        for order, (causal, window) in product(permutations(range(size)), masks):
            options = {"causal": causal, "window": window, "ring_order": order}
            plan = make_plan(layout, size, 4 * size, **options)
            for one in STRATEGIES:
                if one.ways is None or size % one.ways == 0:
                    work = plan_strategy(plan, one, num_heads=size, num_kv_heads=size)
                    for backward in (False, True):
                        check_start_orders(work, backward=backward)


@pytest.mark.parametrize("size", [6, 8, 12, 16])
def test_no_strategy_blocks_on_up_to_sixteen_ranks(size: int) -> None:
    for layout, window in product(LAYOUTS, (None, 5)):
        plan = make_plan(layout, size, 4 * size, window=window)
        for one in STRATEGIES:
            work = plan_strategy(plan, one, num_heads=size, num_kv_heads=size)
            for backward in (False, True):
                check_strategy_progress(work, backward=backward)


def test_a_strategy_that_waits_before_it_sends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plan_checks.strategy_program

    def late(work: StrategyPlan, rank: int, *, backward: bool) -> list[Event]:
        events = right(work, rank, backward=backward)
        waits = [e for e in events if e[0] == "wait"]
        return [*waits, *(e for e in events if e[0] == "post")]

    monkeypatch.setattr(plan_checks, "strategy_program", late)
    for one in STRATEGIES:
        work = plan_strategy(make_plan("zigzag", 4, 16), one, num_heads=4, num_kv_heads=4)
        with pytest.raises(AssertionError, match="blocked"):
            check_start_orders(work, backward=True)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_program_is_what_the_ring_does(layout: str, window: int | None) -> None:
    """Posts and waits of a real call, in order."""
    plan = make_plan(layout, 3, 24, window=window)

    def recorded(cp: CPContext) -> list[list[Event]]:
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        events: list[Event] = []
        counts = {"kv": -1, "grad": -1}
        post, complete = cp.transport.post, cp.transport.complete
        steps = {
            name: [s.index for s in plan.steps[cp.rank] if getattr(s, name) is not None]
            for name in counts
        }

        def posting(out: Any, into: Any, move: Move, channel: str) -> Any:
            if channel in counts:
                counts[channel] += 1
                events.append(("post", channel, steps[channel][counts[channel]]))
            ticket = post(out, into, move, channel)
            ticket.event = channel, counts.get(channel)
            return ticket

        def completing(ticket: Any) -> None:
            channel, number = ticket.event
            if channel in counts:
                events.append(("wait", channel, steps[channel][number]))
            complete(ticket)

        cp.transport.post, cp.transport.complete = posting, completing
        o = ring_attention(x, x, x, cp=cp, window=window)
        forward = [*events]
        events.clear()
        counts.update(kv=-1, grad=-1)
        o.sum().backward()
        return [forward, events]

    found = CPContext.local(3, layout=layout).run(recorded)
    for rank, both in enumerate(found):
        assert both == [program(plan, rank, backward=later) for later in (False, True)]


def test_a_ring_that_waits_before_it_sends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = program

    def late(plan: Plan, rank: int, *, backward: bool) -> list[Event]:
        events = right(plan, rank, backward=backward)
        return [*events[1:2], events[0], *events[2:]]

    monkeypatch.setattr(plan_checks, "program", late)
    for check in (check_progress, check_every_order):
        with pytest.raises(AssertionError, match="blocked"):
            check(make_plan("zigzag", 3, 12), backward=False)


def test_messages_that_meet_in_another_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = program

    def swapped(plan: Plan, rank: int, *, backward: bool) -> list[Event]:
        events = right(plan, rank, backward=backward)
        return [events[1], events[0], *events[2:]] if rank == 1 else events

    monkeypatch.setattr(plan_checks, "program", swapped)
    with pytest.raises(AssertionError, match="meet in their order"):
        check_progress(make_plan("zigzag", 2, 8), backward=True)


# Layouts


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


def test_a_plan_is_made_once() -> None:
    assert make_plan("zigzag", 4, 32) is make_plan("zigzag", 4, 32)
    assert isinstance(make_plan("zigzag", 4, 32).steps[0][0], Step)
