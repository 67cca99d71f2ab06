"""No order of events, of the ring or of a strategy, ends in ranks that wait for each other."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import plan_checks
import pytest
import torch
from plan_checks import (
    Event,
    check_every_order,
    check_progress,
    check_start_orders,
    check_strategy_progress,
    program,
)

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.schedule import LAYOUTS, Move, Plan, make_plan
from nxd_cp.strategies import Strategy, StrategyPlan, plan_strategy


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
