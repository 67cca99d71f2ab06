"""Plans of the strategies: each visible pair once, and what is sent is what is expected."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from cases import rows
from plan_checks import expand
from torch import Tensor

from nxd_cp.reference import hidden
from nxd_cp.schedule import LAYOUTS, make_plan
from nxd_cp.strategies import Strategy, StrategyPlan, heads, plan_strategy
from nxd_cp.strategies.cost import Shape, candidates

MASKS = [(True, None), (True, 5), (False, None)]


def every_plan(layout: str, size: int, causal: bool, window: int | None) -> list[StrategyPlan]:
    """All strategies of one ring plan, with 8 query heads and 4 key/value heads."""
    order = tuple(reversed(range(size)))
    plan = make_plan(layout, size, 4 * size, causal=causal, window=window, ring_order=order)
    return candidates(plan, Shape(1, 8, 4, 16, 4))


def positions(work: StrategyPlan, rank: int) -> Tensor:
    """Global positions of the rows that `rank` computes with: its own, or its group's."""
    plan = work.plan
    if work.groups is None:
        return rows(plan.layout, plan.size, rank, plan.seq_len)
    group = work.groups[rank]
    mine = [rows(plan.layout, plan.size, member, plan.seq_len)[None] for member in range(plan.size)]
    return heads.join_rows(group, mine)[0]


def pairs_seen(work: StrategyPlan) -> dict[int, Tensor]:
    """How often each (query, key) pair is computed, by part of the heads."""
    plan = work.plan
    seen = {
        part: torch.zeros(plan.seq_len, plan.seq_len, dtype=torch.int64)
        for part in range(work.ways)
    }
    for rank in range(plan.size):
        part = 0 if work.groups is None else work.groups[rank].index
        mine = positions(work, rank)
        for step in plan.steps[rank]:
            theirs = positions(work, step.owner)
            for tile in step.tiles:
                shown = ~hidden(tile.mask, tile.q_len, tile.k_len, torch.device("cpu"))
                seen[part][mine[tile.q][:, None], theirs[tile.k][None]] += shown.long()
    return seen


def check_pairs(work: StrategyPlan) -> None:
    plan = work.plan
    q, k = torch.arange(plan.seq_len)[:, None], torch.arange(plan.seq_len)[None]
    expected = (k <= q) | (not plan.causal)
    if plan.window is not None:
        expected = expected & (k > q - plan.window)
    for part, seen in pairs_seen(work).items():
        wrong = int((seen != expected.long()).sum())
        assert wrong == 0, f"{work.strategy} part {part}: {wrong} pairs not computed exactly once"


def check_moves(work: StrategyPlan) -> None:
    """In every hop what one rank sends to another is what that one expects from it."""
    for steps in zip(*work.plan.steps, strict=True):
        for kind in ("kv", "grad"):
            sent, expected = Counter(), Counter()
            for rank, step in enumerate(steps):
                move = getattr(step, kind)
                if move is not None and move.to is not None:
                    sent[rank, move.to] += 1
                if move is not None and move.source is not None:
                    expected[move.source, rank] += 1
            assert sent == expected, f"{work.strategy} {kind}: {sent} sent, {expected} expected"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 16])
def test_every_strategy_computes_each_visible_pair_once(layout: str, size: int) -> None:
    for causal, window in MASKS:
        for work in every_plan(layout, size, causal, window):
            check_pairs(work)
            check_moves(work)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_gathered_is_used_and_comes_from_its_owner(layout: str) -> None:
    for size, (causal, window) in product((2, 5, 8), MASKS):
        plan = make_plan(layout, size, 4 * size, causal=causal, window=window)
        work = plan_strategy(plan, Strategy("gather"), num_heads=2, num_kv_heads=2)
        for steps in work.plan.steps:
            for step, following in pairwise(steps):
                if step.kv is not None and step.kv.source is not None:
                    assert step.kv.source == step.kv.brings == following.owner
                    used = expand(tuple(tile.k for tile in following.tiles))
                    assert expand(step.kv.into) == used, "what is seen, and nothing else"


def test_a_missing_tile_and_a_missing_move_are_caught() -> None:
    work = every_plan("zigzag", 4, True, None)[1]
    first, *others = work.plan.steps
    holed = dataclasses.replace(first[1], tiles=first[1].tiles[1:], kv=None)
    steps = ((first[0], holed, *first[2:]), *others)
    broken = dataclasses.replace(work, plan=dataclasses.replace(work.plan, steps=steps))
    with pytest.raises(AssertionError, match="pairs not computed exactly once"):
        check_pairs(broken)
    with pytest.raises(AssertionError, match="sent"):
        check_moves(broken)


def test_heads_keep_the_balance_and_shorten_the_ring() -> None:
    plan = make_plan("zigzag", 8, 64)
    work = plan_strategy(plan, Strategy("heads", ways=4), num_heads=8, num_kv_heads=4)
    assert [group.members for group in work.groups[:1]] == [(0, 1, 2, 3)]
    assert work.plan.num_steps == 2
    assert max(work.plan.balance()) == max(make_plan("zigzag", 2, 64).balance())
    striped = plan_strategy(
        make_plan("striped", 8, 64), Strategy("heads", ways=4), num_heads=8, num_kv_heads=4
    )
    assert striped.groups[0].members == (0, 2, 4, 6), "every other stripe joins to one of two"
