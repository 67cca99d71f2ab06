"""Strategies: their plans are proved, their results are those of fp64, their traffic is exact."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close, assert_within_budget
from cases import NAMES, Case, all_ranks_locally, join_all, one_device, one_rank, rows, truth
from click.testing import Result
from plan_checks import expand
from ranks import RankGroup
from torch import Tensor
from typer.testing import CliRunner

import nxd_cp.strategies
from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.cli import app
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.options import Options
from nxd_cp.reference import hidden
from nxd_cp.schedule import LAYOUTS, Plan, Step, make_plan
from nxd_cp.strategies import Strategy, StrategyPlan, cost, heads, plan_strategy
from nxd_cp.strategies import plan as strategies_plan
from nxd_cp.strategies.cost import FIGURES, Shape, candidates, choose, compare, estimate
from nxd_cp.strategies.plan import LEAST_ROUND_BYTES

MASKS = [(True, None), (True, 5), (False, None)]
SOME = [
    Strategy("gather"),
    Strategy("gather", heads_per_round=3),
    Strategy("ring", heads_per_round=3),
    Strategy("heads"),
]


def check_fp32(case: Case, found: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(NAMES, found, truth(case), strict=True):
        assert_close(f"{case} {name}", x, y, FP32_OUTPUT if name == "o" else FP32_GRADIENT)


# The plans


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


# Results

GRID = [
    Case(layout=layout, size=size, causal=causal, window=window, S=96, Hq=8, Hkv=4, strategy=one)
    for layout in LAYOUTS
    for size in (2, 3, 4, 8)
    for causal, window in MASKS
    for one in SOME
    if not (one.name == "heads" and size == 3)
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_fp32_outputs_and_gradients_are_those_of_fp64(case: Case) -> None:
    with debug():
        check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("one", [*SOME, Strategy("heads", ways=2)], ids=str)
@pytest.mark.parametrize("num_keys", [31, 96, 143])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_keys_than_queries_or_fewer(layout: str, num_keys: int, one: Strategy) -> None:
    for causal, window in MASKS:
        case = Case(
            layout=layout,
            size=4,
            causal=causal,
            window=window,
            S=62,
            Skv=num_keys,
            Hq=8,
            Hkv=4,
            strategy=one,
        )
        check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("one", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_error_is_that_of_one_device(one: Strategy, dtype: torch.dtype) -> None:
    case = Case(size=4, S=240, Hq=8, Hkv=4, D=64, dtype=dtype, strategy=one)
    results = zip(NAMES, all_ranks_locally(case), truth(case), one_device(case), strict=True)
    for name, x, y, baseline in results:
        assert_within_budget(f"{case} {name}", x, y, baseline)


def test_rounds_of_heads_hold_smaller_buffers() -> None:
    def held(cp: CPContext) -> int:
        ring_attention(*torch.randn(3, 1, 4, 128, 32), cp=cp)
        return sum(buffer.numel() for buffer in cp.transport.buffers._free)

    whole, *_ = CPContext.local(2).run(held)
    rounds, *_ = CPContext.local(2, strategy=Strategy("ring", heads_per_round=2)).run(held)
    assert 0 < rounds <= 0.51 * whole, (rounds, whole)


@pytest.mark.parametrize(
    ("local_len", "heads", "kv_heads", "rounds"),
    [
        (1024, 8, 8, 1),  # 1 MiB per head: eight make a round
        (2048, 8, 8, 2),
        (2048, 8, 2, 2),  # four query heads read each: one makes a round
        (2048, 6, 3, 2),
        (8192, 8, 8, 4),  # query heads do not pair up, so heads go by two
        (8192, 3, 3, 3),
        (64, 8, 8, 1),
        (8192, 8, 1, 1),
    ],
)
def test_a_ring_runs_in_rounds_that_stay_large(
    local_len: int, heads: int, kv_heads: int, rounds: int
) -> None:
    plan = make_plan("zigzag", 2, 2 * local_len)
    shape = Shape(1, heads, kv_heads, 128, 4)
    work = cost.plan_for(plan, Strategy("ring"), shape)
    assert len(work.rounds) == rounds
    assert [h for one in work.rounds for h in range(kv_heads)[one]] == list(range(kv_heads))
    if rounds > 1:
        kept = work.rounds[0].stop * (heads // kv_heads) * plan.longest_hop * shape.row_bytes
        assert kept >= LEAST_ROUND_BYTES
    asked = cost.plan_for(plan, Strategy("ring", heads_per_round=kv_heads), shape)
    assert len(asked.rounds) == 1, "the caller's number is taken"


def test_a_window_makes_messages_of_its_halo_and_as_many_rounds() -> None:
    plan = make_plan("contiguous", 4, 2**16, window=4097)
    assert plan.longest_hop == 4096
    assert len(cost.plan_for(plan, Strategy("ring"), Shape(1, 8, 8, 128, 4)).rounds) == 4
    assert len(cost.plan_for(plan, Strategy("ring"), Shape(1, 8, 8, 128, 2)).rounds) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_that_the_rule_made_give_what_one_round_does(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case = Case(size=3, S=250, Hq=8, Hkv=4, dtype=dtype, sinks=True, window=90)
    whole = all_ranks_locally(dataclasses.replace(case, strategy=Strategy("ring")))
    monkeypatch.setattr(strategies_plan, "LEAST_ROUND_BYTES", 1)
    plan_strategy.cache_clear()
    rounds = all_ranks_locally(dataclasses.replace(case, strategy=Strategy("ring")))
    plan_strategy.cache_clear()
    for name, x, y in zip(case.names, rounds, whole, strict=True):
        eps = torch.finfo(torch.float32 if name == "dsinks" else dtype).eps
        assert_close(name, x, y.double(), 2 * eps * float(y.abs().max()))


@pytest.mark.parametrize("one", SOME, ids=str)
def test_packed_documents_work_with_every_strategy(one: Strategy) -> None:
    case = Case(size=4, S=48, Hq=8, Hkv=4, strategy=one)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 2, (1, case.S), generator=generator).cumsum(-1)

    def work(cp: CPContext) -> Tensor:
        mine = rows(case.layout, case.size, cp.rank, case.S)
        x = torch.randn(1, 8, case.S, 16, generator=torch.Generator().manual_seed(7))[:, :, mine]
        return ring_attention(x, x[:, :4], x[:, :4], cp=cp, segment_ids=ids[:, mine])

    plain = CPContext.local(4).run(work)
    found = CPContext.local(4, strategy=one).run(work)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("one", [*SOME, Strategy("heads", ways=2)], ids=str)
def test_two_runs_are_bitwise_equal(one: Strategy) -> None:
    case = Case(size=4, S=96, Hq=8, Hkv=4, strategy=one)
    first, second = all_ranks_locally(case), all_ranks_locally(case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("one", [Strategy("ring"), *SOME], ids=str)
def test_results_lie_in_memory_as_compiled_code_is_told(one: Strategy) -> None:
    """Compiled code reads them by the strides of the op's fake kernels."""

    def work(cp: CPContext) -> list[tuple[Any, ...]]:
        q, k, v = (torch.randn(2, h, 8, 16) for h in (8, 4, 4))
        plain = Options(cp.handle, True, None, None, 0.25, None, None, None, "torch", True)
        o, lse, number = ops.ring_forward(q, k, v, None, None, None, *plain)
        given = (torch.ones_like(o), q, k, v, None, None, None, o, lse, number, *plain)
        real = [o, lse, *ops.ring_backward(*given)]
        fake = [*ops._forward_fake(q, k, v)[:2], *ops._backward_fake(*given)]
        return [(x.stride(), y.stride()) for x, y in zip(real, fake, strict=True)]

    for strides in CPContext.local(4, strategy=one).run(work):
        assert all(real == fake for real, fake in strides)


def over_gloo(group: dist.ProcessGroup, case: Case) -> tuple[Tensor, ...]:
    cp = CPContext.from_group(group, layout=case.layout, strategy=case.strategy)
    return one_rank(cp, case)


@pytest.mark.parametrize("one", [*SOME, Strategy("heads", ways=2)], ids=str)
def test_processes_compute_what_threads_do(ranks: RankGroup, one: Strategy) -> None:
    case = Case(size=4, S=96, Hq=8, Hkv=4, window=40, strategy=one)
    found = join_all(ranks.run(over_gloo, case), case)
    assert all(torch.equal(x, y) for x, y in zip(found, all_ranks_locally(case), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one", [*SOME, Strategy("heads", ways=2)], ids=str)
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_messages_and_bytes_are_exactly_the_plans(
    one: Strategy, dtype: torch.dtype, causal: bool, window: int | None
) -> None:
    case = Case(
        size=4,
        B=2,
        S=80,
        Skv=112,
        Hq=8,
        Hkv=4,
        Dv=24,
        dtype=dtype,
        causal=causal,
        window=window,
        strategy=one,
    )

    def count(cp: CPContext) -> tuple[int, int]:
        one_rank(cp, case)
        return cp.transport.counters.ring_messages, cp.transport.counters.ring_bytes

    plan = make_plan("zigzag", 4, case.S, kv_len=case.Skv, causal=causal, window=window)
    shape = Shape(2, 8, 4, 16, dtype.itemsize, v_head_dim=24)
    work = cost.plan_for(plan, one, shape)
    for rank, found in enumerate(CPContext.local(4, strategy=one).run(count)):
        due = work.traffic(rank, **vars(shape))
        assert found == (
            due.forward_messages + due.backward_messages,
            due.forward_bytes + due.backward_bytes,
        )


# Faults


def test_ways_that_do_not_divide_are_refused_on_all_ranks() -> None:
    with pytest.raises(ValueError, match="use a divisor of 2"):
        all_ranks_locally(Case(size=4, strategy=Strategy("heads", ways=4)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "rings"}, "expected one of ring, gather, heads, auto, got rings"),
        ({"name": "gather", "heads_per_round": 0}, "heads_per_round: expected at least 1"),
        ({"name": "heads", "heads_per_round": 1}, "heads_per_round: expected at least 1"),
        ({"name": "ring", "heads_per_round": 1.5}, "heads_per_round: expected a whole number or"),
        ({"name": "heads", "ways": True}, "ways: expected a whole number or None, got True"),
        ({"name": "ring", "ways": 2}, 'ways: expected at least 1 with strategy "heads"'),
    ],
)
def test_bad_strategies_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Strategy(**options)


def other_strategy(group: dist.ProcessGroup) -> str:
    one = "heads" if dist.get_rank(group) == 1 else "ring"
    cp = CPContext.from_group(group, strategy=one)
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        ring_attention(x, x, x, cp=cp)
    return str(caught.value)


def test_ranks_with_different_strategies_all_raise_and_say_so(ranks: RankGroup) -> None:
    for text in ranks.run(other_strategy, num_ranks=2):
        assert "strategy = ring on rank 0, heads on rank 1" in text


def planted(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    right = cost.plan_strategy
    monkeypatch.setattr(cost, "plan_strategy", lambda *a, **options: change(right(*a, **options)))


def test_tokens_in_the_wrong_place_after_the_exchange_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def swapped(work: StrategyPlan) -> StrategyPlan:
        groups = tuple(dataclasses.replace(one, rows=one.rows[::-1]) for one in work.groups)
        return dataclasses.replace(work, groups=groups)

    case = Case(size=2, strategy="heads")
    check_fp32(case, all_ranks_locally(case))
    planted(monkeypatch, swapped)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_rounds_that_leave_heads_out_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(work: StrategyPlan) -> StrategyPlan:
        return dataclasses.replace(work, rounds=(work.rounds[0], work.rounds[0]))

    planted(monkeypatch, short)
    case = Case(size=2, strategy="gather")
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_gathered_buffers_are_given_back_after_each_round() -> None:
    plan = make_plan("zigzag", 3, 192)
    work = plan_strategy(plan, Strategy("gather"), num_heads=6, num_kv_heads=6)

    def held(cp: CPContext) -> list[int]:
        x = torch.randn(1, 6, 64, 16)
        found = []
        with cp.transport.call("forward") as call:
            for _, _, posted in nxd_cp.strategies.rounds_of(call, work, cp.rank, x, x, x):
                found.append(len(call._parcels))
                for _ in range(cp.size - 1):
                    posted.posted_hop().wait()
        return found

    ends = [2 * len(steps[:-1]) if _halves(steps) else len(steps[:-1]) for steps in work.plan.steps]
    assert CPContext.local(3).run(held) == [[2 * n, 2 * n, 2 * n, 2 * n, 2 * n, n] for n in ends]


def _halves(steps: tuple[Step, ...]) -> bool:
    """What goes out has another size than what comes in, and so a buffer of its own."""
    return any(s.kv is not None and s.kv.out != s.kv.into for s in steps)


# The rule


def chosen(seq_len: int, size: int = 8, shape: Shape | None = None) -> Strategy:
    plan = make_plan("zigzag", size, seq_len)
    return choose(plan, Strategy("auto"), shape or Shape(1, 32, 8, 128, 2))


def test_the_rule_takes_the_ring_where_it_hides_and_another_where_it_cannot() -> None:
    assert chosen(2**20).name == "ring"
    assert chosen(2**12).name != "ring"


def test_the_rule_never_takes_heads_that_do_not_divide() -> None:
    for size, num_kv_heads in product((2, 4, 8), (1, 2, 3, 8)):
        shape = Shape(1, 8 * num_kv_heads, num_kv_heads, 64, 2)
        for one in compare(make_plan("zigzag", size, 64 * size), shape, "trn1"):
            ways = one.work.ways
            assert size % ways == 0
            assert num_kv_heads % ways == 0


def test_with_free_links_all_strategies_cost_the_computation_and_the_ring_is_taken() -> None:
    free = dataclasses.replace(FIGURES["trn2"], gb_per_s=1e12, latency_us=0.0)
    shape = Shape(1, 8, 4, 64, 2)
    plan = make_plan("contiguous", 4, 4096, causal=False)
    ideal = 3.5 * 4 * 64 * 8 * 4096 * 1024 / (free.tflops * free.efficiency * 1e12)
    for work in candidates(plan, shape):
        assert estimate(work, shape, free).seconds == pytest.approx(ideal, rel=1e-6)
    long = make_plan("contiguous", 4, 2**20, causal=False)
    assert compare(long, shape, "trn2")[0].work.strategy.name == "ring"


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ValueError, match="chip: expected one of trn1, trn2, trn3, got 'trn9'"):
        compare(make_plan("zigzag", 2, 64), Shape(1, 2, 2, 16, 2), "trn9")


def test_auto_computes_what_it_chose() -> None:
    case = Case(size=4, S=96, Hq=8, Hkv=4, strategy="auto")
    plan: Plan = make_plan("zigzag", 4, 96)
    assert choose(plan, Strategy("auto"), Shape(1, 8, 4, 16, 4)).name != "ring"
    check_fp32(case, all_ranks_locally(case))


# The command


def planned(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_plan_command_prints_costs_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "made" / "plan.png"
    result = planned("--ranks", "4", "--seq-len", "4096", "--png", str(picture))
    assert result.exit_code == 0, result.output
    assert "taken: " in result.output
    assert "by the rule" in result.output
    for name in ("ring", "gather", "heads x2", "heads x4"):
        assert f"\n{name} " in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plan_command_shows_the_steps_of_what_was_asked_for() -> None:
    result = planned("--ranks", "4", "--seq-len", "64", "--strategy", "heads")
    assert "taken: heads x4, asked for" in result.output
    assert "causal" in result.output.splitlines()[2]
    assert "zigzag, 4 ranks, 61 tokens (16 per rank), causal" in planned("--seq-len", "61").output
    refused = planned("--ranks", "4", "--heads", "9", "--kv-heads", "3", "--strategy", "heads")
    assert refused.exit_code == 2
    assert "expected one of gather, ring" in " ".join(refused.output.split())


def test_message_bytes_of_the_rule_are_those_of_the_plans() -> None:
    """The largest messages times their number are at least, and near, what is sent in all."""
    shape = Shape(1, 8, 4, 64, 2)
    for one in compare(make_plan("zigzag", 4, 4096, causal=False), shape, "trn2"):
        kv, grad, exchanged = one.hop_bytes
        traffic = one.work.traffic(0, **vars(shape))
        rounds, ways = len(one.work.rounds), one.work.ways
        sent = rounds * (2 * kv + grad) * (4 // ways - 1)
        if one.work.strategy.name == "ring":
            sent += grad  # gradients make the full turn
        extra = (traffic.forward_bytes + traffic.backward_bytes) - sent
        assert extra >= 0
        assert extra <= 3 * exchanged * (ways - 1) + grad + 64 * one.num_messages
