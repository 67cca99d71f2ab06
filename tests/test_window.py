"""Sliding windows: the schedule proved by expansion, the ring against fp64, planted faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close, assert_within_budget, error
from cases import NAMES, Case, all_ranks_locally, check_fp32, join_all, one_device, one_rank, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_checks import check_gradients, check_moves, check_pairs, check_plan
from ranks import RankGroup
from test_attention import over_gloo
from torch import Tensor

import nxd_cp.ops
from nxd_cp import reference
from nxd_cp.attention import ring_attention
from nxd_cp.backends import torch_bounded, torch_flash
from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import (
    HEADER_BYTES,
    LAYOUTS,
    Bounded,
    Move,
    Plan,
    Tile,
    make_plan,
    seq_len_multiple,
)


def windows(plan_len: int, local_len: int) -> list[int]:
    edges = {1, 2, 3, local_len - 1, local_len, local_len + 1, local_len + 2, 2 * local_len}
    return sorted(w for w in {*edges, plan_len - 1, plan_len, plan_len + 5} if w > 0)


def kv_moves(plan: Plan, index: int) -> dict[int, Move]:
    moves = {rank: steps[index].kv for rank, steps in enumerate(plan.steps)}
    return {rank: move for rank, move in moves.items() if move is not None}


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_visible_pair_is_computed_once_and_only_what_is_used_moves(
    layout: str, size: int, chunk: int
) -> None:
    seq_len = chunk * seq_len_multiple(layout, size)
    for window in windows(seq_len, seq_len // size):
        plan = make_plan(layout, size, seq_len, window=window)
        assert (plan.window is None) == (window >= seq_len)
        check_plan(plan)


@settings(max_examples=60)
@given(st.sampled_from(LAYOUTS), st.integers(1, 16), st.integers(1, 3), st.data())
def test_large_rings_in_any_order_hold_too(
    layout: str, size: int, chunk: int, data: st.DataObject
) -> None:
    order = tuple(data.draw(st.permutations(range(size))))
    seq_len = chunk * seq_len_multiple(layout, size)
    window = data.draw(st.integers(1, seq_len + 1))
    check_plan(make_plan(layout, size, seq_len, window=window, ring_order=order))


@pytest.mark.parametrize(("window", "hops"), [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_contiguous_keys_travel_as_far_as_the_window(window: int, hops: int) -> None:
    plan = make_plan("contiguous", 8, 32, window=window)
    assert plan.num_steps == 1 + hops
    for index in range(hops):
        senders = {rank for rank, move in kv_moves(plan, index).items() if move.to is not None}
        # Ranks 0..index hold nothing that came from a rank before them; the last has no successor.
        assert senders == set(range(index, 7))
    traffic = plan.traffic(3, batch=1, num_kv_heads=1, head_dim=1, itemsize=4)
    assert traffic.forward_messages == min(hops, 4)
    assert traffic.backward_messages == min(hops, 4) + min(hops, 3)


def test_only_the_rows_that_the_window_reaches_travel() -> None:
    plan = make_plan("contiguous", 4, 400, window=31)
    sizes = {"batch": 1, "num_kv_heads": 2, "head_dim": 16, "itemsize": 4}
    for rank in range(3):
        move = plan.steps[rank][0].kv
        assert move is not None
        assert move.out == (slice(70, 100),), "the last 30 of 100 rows"
        row = 2 * 2 * 16 * 4
        assert plan.traffic(rank, **sizes).forward_bytes == 30 * row + HEADER_BYTES
    longer = make_plan("contiguous", 4, 400, window=131)
    assert [step.kv.out for step in longer.steps[1][:2]] == [(slice(0, 100),), (slice(70, 100),)]


def test_tiles_are_cut_to_the_window_and_named_simply() -> None:
    plan = make_plan("contiguous", 4, 32, window=4)
    assert plan.steps[2][0].tiles == (Tile(slice(0, 8), slice(0, 8), Bounded(-3, 0)),)
    assert plan.steps[2][1].tiles == (Tile(slice(0, 3), slice(5, 8), Bounded(0, 3)),)
    wide = make_plan("contiguous", 4, 32, window=20)
    assert [tile.mask for tile in wide.tiles(3)][:2] == ["causal", "full"]
    assert "causal, window 4" in plan.table()
    assert "bounded -3..+0" in plan.table()


@pytest.mark.parametrize(("window", "causal"), [(0, True), (4, False)])
def test_a_bad_window_is_refused(window: int, causal: bool) -> None:
    with pytest.raises(ValueError, match="window: expected at least 1 and a causal mask"):
        make_plan("zigzag", 2, 8, window=window, causal=causal)


def change_step(plan: Plan, rank: int, index: int, **changes: object) -> Plan:
    steps = [list(mine) for mine in plan.steps]
    steps[rank][index] = dataclasses.replace(steps[rank][index], **changes)
    return dataclasses.replace(plan, steps=tuple(map(tuple, steps)))


def test_a_band_that_is_too_wide_is_caught() -> None:
    plan = make_plan("contiguous", 4, 32, window=4)
    (tile,) = plan.steps[2][0].tiles
    wide = dataclasses.replace(tile, mask=Bounded(-4, 0))
    with pytest.raises(AssertionError):
        check_pairs(change_step(plan, 2, 0, tiles=(wide,)))


@pytest.mark.parametrize(
    ("index", "move"), [(0, None), (0, Move(3, None, 1)), (0, Move(None, 1, 1)), (1, Move(3, 1, 0))]
)
def test_a_dropped_one_sided_or_dead_hop_is_caught(index: int, move: Move | None) -> None:
    plan = make_plan("contiguous", 4, 32, window=4)
    with pytest.raises((AssertionError, KeyError)):
        check_moves(change_step(plan, 2, index, kv=move))


def test_a_dead_round_of_hops_is_caught() -> None:
    plan = make_plan("contiguous", 3, 12, window=1)
    for rank in range(3):
        left = (rank - 1) % 3
        all_rows = (slice(0, 4),)
        plan = change_step(plan, rank, 0, kv=Move((rank + 1) % 3, left, left, all_rows, all_rows))
    with pytest.raises(AssertionError, match="a hop is dead"):
        check_moves(plan)


def test_a_part_that_is_not_sent_home_is_caught() -> None:
    plan = make_plan("zigzag", 3, 24, window=5)
    index = next(i for i in (1, 2) if plan.steps[1][i].tiles)
    with pytest.raises((AssertionError, KeyError)):
        check_gradients(change_step(plan, 1, index, grad=None))


# Numbers


GRID = [
    Case(layout=layout, size=size, S=48, Hq=Hq, Hkv=Hkv, window=window)
    for layout in LAYOUTS
    for size in (1, 2, 3, 4, 8)
    for window in (1, 2, 5, 12, 13, 31, 47, 48)
    for Hq, Hkv in ((3, 3), (6, 3), (8, 1))
]
SHAPES = [
    Case(layout=layout, size=size, B=2, S=S, Hq=4, Hkv=2, D=D, window=window)
    for layout in LAYOUTS
    for size, S, D, window in ((2, 1200, 16, 300), (2, 1200, 16, 700), (3, 120, 80, 50))
]


@pytest.mark.parametrize("case", [*GRID, *SHAPES], ids=str)
def test_fp32_outputs_and_gradients_are_those_of_fp64(case: Case) -> None:
    with debug():
        check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bit_error_is_that_of_one_device(layout: str, dtype: torch.dtype) -> None:
    case = Case(layout=layout, size=4, S=240, Hq=6, Hkv=3, D=64, dtype=dtype, window=75)
    results = zip(NAMES, all_ranks_locally(case), truth(case), one_device(case), strict=True)
    for name, x, y, baseline in results:
        assert x.dtype == dtype
        assert_within_budget(f"{case} {name}", x, y, baseline)


def test_error_does_not_grow_with_hops() -> None:
    errors = {}
    for size in (2, 16):
        case = Case(layout="contiguous", size=size, S=512, D=64, window=400)
        found = all_ranks_locally(case)
        errors[size] = [error(x, y).relative_rms for x, y in zip(found, truth(case), strict=True)]
    assert all(many <= 1.3 * few for few, many in zip(errors[2], errors[16], strict=True)), errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_order_changes_who_talks_and_two_runs_are_equal(layout: str) -> None:
    case = Case(layout=layout, size=4, window=17)
    check_fp32(case, all_ranks_locally(case, ring_order=(0, 3, 1, 2)))
    first, second = all_ranks_locally(case), all_ranks_locally(case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_agree_with_fp64_and_send_what_the_schedule_says(
    ranks: RankGroup, size: int
) -> None:
    cases = [
        Case(layout=layout, size=size, S=72, Hq=6, Hkv=3, window=window)
        for layout in LAYOUTS
        for window in (1, 7, 20, 40)
    ]
    by_rank = ranks.run(over_gloo, cases, num_ranks=size)
    for case, *results in zip(cases, *by_rank, strict=True):
        check_fp32(case, join_all([tensors for tensors, _, _ in results], case))
        plan = make_plan(case.layout, size, case.S, window=case.window)
        for rank, (_, messages, size_bytes) in enumerate(results):
            traffic = plan.traffic(
                rank, batch=case.B, num_kv_heads=case.Hkv, head_dim=case.D, itemsize=4
            )
            assert messages == traffic.forward_messages + traffic.backward_messages
            assert size_bytes == traffic.forward_bytes + traffic.backward_bytes


def test_it_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))

    def loss(*x: Tensor) -> Tensor:
        return ring_attention(*x, window=5).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# Rectangles on the backend

BANDS = [
    (31, 31, Bounded(-4, 0)),
    (12, 31, Bounded(3, 9)),
    (31, 12, Bounded(-15, -12)),  # rows at both ends see nothing
    (9, 9, Bounded(-20, 20)),
    (5, 7, Bounded(30, 40)),  # nothing at all
]


@pytest.fixture(params=["flash", "plain"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    if request.param == "plain":
        monkeypatch.setattr(torch_flash, "has_flash", lambda q: False)
    monkeypatch.setattr(torch_bounded, "_QUERY_BLOCK", 7)
    return TorchBackend()


@pytest.mark.parametrize(("Sq", "Skv", "band"), BANDS)
def test_a_band_is_the_reference(backend: TorchBackend, Sq: int, Skv: int, band: Bounded) -> None:
    q, k, v, do = (torch.randn(2, h, s, 16) for h, s in ((4, Sq), (2, Skv), (2, Skv), (4, Sq)))
    o, lse = backend.forward(q, k, v, Scores(band, 0.25))
    exact = [x.double() for x in (q, k, v, do)]
    o_true, lse_true = reference.attention(*exact[:3], mask=band, scale=0.25)
    assert_close("o", o, o_true, FP32_OUTPUT)
    seen = lse_true > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    torch.testing.assert_close(lse[seen].double(), lse_true[seen], rtol=0, atol=FP32_OUTPUT)
    found = backend.backward(QueryRows(do, q, o, lse, (do * o).sum(-1)), k, v, Scores(band, 0.25))
    expected = reference.attention_backward(exact[3], *exact[:3], mask=band, scale=0.25)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(name, x, y, FP32_GRADIENT)


# Planted faults


def planted(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = nxd_cp.ops.plan_for
    monkeypatch.setattr(nxd_cp.ops, "plan_for", lambda *arguments: change(right(*arguments)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_that_is_one_off_is_caught(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(
        monkeypatch,
        lambda plan: make_plan(plan.layout, plan.size, plan.seq_len, window=plan.window + 1),
    )
    case = Case(layout=layout, size=2, window=9)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_gradients_that_are_not_sent_home_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(plan: Plan) -> Plan:
        steps = tuple(
            tuple(dataclasses.replace(step, grad=None) for step in mine) for mine in plan.steps
        )
        return dataclasses.replace(plan, steps=steps)

    planted(monkeypatch, kept)
    case = Case(layout="contiguous", size=2, window=9)
    with pytest.raises(AssertionError, match=r"d[kv]: .*expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_a_rank_that_does_not_send_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda plan: change_step(plan, 1, 1, kv=None))
    case = Case(layout="contiguous", size=4, window=40)
    with pytest.raises(RuntimeError, match="different order"):
        all_ranks_locally(case, timeout_s=5)


def one_rank_counts(cp: CPContext, case: Case) -> int:
    one_rank(cp, case)
    return cp.transport.counters.ring_messages


def test_a_window_of_one_token_sends_nothing() -> None:
    case = Case(layout="contiguous", size=4, window=1)
    assert (
        CPContext.local(4, layout="contiguous").run(lambda cp: one_rank_counts(cp, case)) == [0] * 4
    )
