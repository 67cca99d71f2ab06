"""Results of the strategies are those of fp64, their traffic is exact, faults are caught."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close, assert_within_budget
from cases import NAMES, Case, all_ranks_locally, join_all, one_device, one_rank, rows, truth
from ranks import RankGroup
from torch import Tensor

import nxd_cp.strategies
from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.options import Options
from nxd_cp.schedule import LAYOUTS, Plan, Step, make_plan
from nxd_cp.strategies import Strategy, StrategyPlan, cost, plan_strategy
from nxd_cp.strategies import plan as strategies_plan
from nxd_cp.strategies.cost import Shape, choose

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


def test_auto_computes_what_it_chose() -> None:
    case = Case(size=4, S=96, Hq=8, Hkv=4, strategy="auto")
    plan: Plan = make_plan("zigzag", 4, 96)
    assert choose(plan, Strategy("auto"), Shape(1, 8, 4, 16, 4)).name != "ring"
    check_fp32(case, all_ranks_locally(case))


# Faults


def test_heads_that_no_ranks_can_split_are_refused_and_do_not_become_a_ring() -> None:
    def work(cp: CPContext) -> None:
        ring_attention(*torch.randn(3, 1, 8, 16, 16), cp=cp)

    with pytest.raises(ValueError, match='"heads": expected 3 ranks that share a divisor with 8'):
        CPContext.local(3, strategy="heads").run(work)


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
