"""The ring against fp64 on the local transport: numbers, message counts, merges, planted faults."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from budgets import (
    HOPS_FACTOR,
    assert_close,
    assert_within_budget,
    error,
)
from cases import NAMES, Case, all_ranks_locally, check_fp32, join_all, one_device, one_rank, truth
from torch import Tensor

import nxd_cp.ops
from nxd_cp import reference, ring
from nxd_cp.attention import ring_attention
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.merging import merge_
from nxd_cp.schedule import LAYOUTS, Step, make_plan
from nxd_cp.transport import Hop

GRID = [
    Case(layout=layout, size=size, causal=causal, S=48, Hq=Hq, Hkv=Hkv, D=D)
    for layout in LAYOUTS
    for size in (1, 2, 3, 4)
    for causal in (True, False)
    for Hq, Hkv in ((3, 3), (6, 3), (8, 1))
    for D in (16, 64, 80, 128)
]
SHAPES = [
    Case(layout=layout, size=size, causal=causal, B=2, S=120, Hq=Hq, Hkv=Hkv, D=D)
    for layout in LAYOUTS
    for causal in (True, False)
    for size, Hq, Hkv, D in ((2, 5, 5, 64), (3, 8, 1, 80), (4, 10, 5, 128))
]


@pytest.mark.parametrize("case", [*GRID, *SHAPES], ids=str)
def test_fp32_outputs_and_gradients_are_those_of_fp64(case: Case) -> None:
    with debug():
        check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bit_error_is_that_of_one_device(
    layout: str, size: int, dtype: torch.dtype
) -> None:
    case = Case(layout=layout, size=size, S=240, Hq=6, Hkv=3, D=64, dtype=dtype)
    results = zip(NAMES, all_ranks_locally(case), truth(case), one_device(case), strict=True)
    for name, x, y, baseline in results:
        assert x.dtype == dtype
        assert_within_budget(f"{case} {name}", x, y, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_does_not_grow_with_hops(dtype: torch.dtype) -> None:
    errors = {}
    for size in (2, 16):
        case = Case(size=size, S=512, Hq=4, Hkv=2, D=64, dtype=dtype)
        found = all_ranks_locally(case)
        errors[size] = [error(x, y).relative_rms for x, y in zip(found, truth(case), strict=True)]
    print(dtype, {size: [f"{e:.2e}" for e in found] for size, found in errors.items()})
    assert all(many <= HOPS_FACTOR * few for few, many in zip(errors[2], errors[16], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_order_changes_who_talks_and_not_the_result(layout: str) -> None:
    case = Case(layout=layout, size=4)
    check_fp32(case, all_ranks_locally(case, ring_order=(0, 3, 1, 2)))


def test_two_runs_are_bitwise_equal() -> None:
    case = Case(size=4, S=96, Hq=4, Hkv=2, D=64)
    first, second = all_ranks_locally(case), all_ranks_locally(case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_messages_and_bytes_are_exactly_the_schedules(size: int, dtype: torch.dtype) -> None:
    case = Case(size=size, B=2, S=20 * size, Hq=4, Hkv=2, D=16, dtype=dtype)
    group = CPContext.local(size)

    def count(cp: CPContext) -> tuple[int, int]:
        one_rank(cp, case)
        return cp.transport.counters.ring_messages, cp.transport.counters.ring_bytes

    plan = make_plan("zigzag", size, case.S)
    for rank, found in enumerate(group.run(count)):
        expected = plan.traffic(rank, batch=2, num_kv_heads=2, head_dim=16, itemsize=dtype.itemsize)
        assert found == (
            expected.forward_messages + expected.backward_messages,
            expected.forward_bytes + expected.backward_bytes,
        )
        assert found[0] == (size - 1) + (size - 1) + (size if size > 1 else 0)


def test_the_next_block_leaves_before_the_present_one_is_computed() -> None:
    events: list[str] = []

    class Recorder(TorchBackend):
        def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            events.append("compute")
            return super().forward(*arguments)

    def work(cp: CPContext) -> None:
        x = torch.randn(1, 2, 8, 16)
        plan = make_plan("zigzag", 3, 24)
        with cp.transport.call("forward") as call:
            if cp.rank == 0:
                post = cp.transport.post
                cp.transport.post = lambda *a: (events.append("send"), post(*a))[1]
            backend = Recorder() if cp.rank == 0 else TorchBackend()
            ring.forward(x, x, x, plan=plan, rank=cp.rank, backend=backend, call=call, scale=1.0)

    CPContext.local(3).run(work)
    assert events == ["send", "compute", "send", "compute", "compute"]


# Merging


def running(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(*shape, 4), torch.full(shape, -torch.inf)


def test_merging_parts_is_attention_over_all_keys() -> None:
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)
    o, lse = running(1, 2, 5)
    for start in (0, 3, 9):
        keys = slice(start, start + (6 if start == 3 else 3))
        part = reference.attention(q, k[:, :, keys], v[:, :, keys], mask="full", scale=1.0)
        merge_(o, lse, *part)
    exact = [x.double() for x in (q, k, v)]
    o_true, lse_true = reference.attention(*exact, mask="full", scale=1.0)
    assert_close("o", o, o_true, 1e-6)
    assert_close("lse", lse, lse_true, 1e-6)


def test_merging_empty_parts_keeps_zero_and_minus_infinity() -> None:
    o, lse = running(1, 1, 3)
    merge_(o, lse, *running(1, 1, 3))
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    part = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3)
    merge_(o, lse, *part)
    assert torch.equal(o, part[0])
    assert torch.equal(lse, part[1])
    merge_(o, lse, *running(1, 1, 3))
    assert torch.equal(o, part[0])
    assert torch.equal(lse, part[1])


@pytest.mark.parametrize("high", [3e4, 1e30])
def test_merging_large_logits_stays_finite(high: float) -> None:
    o, lse = torch.ones(1, 1, 2, 4), torch.tensor([[[high, -high]]])
    merge_(o, lse, torch.zeros(1, 1, 2, 4), torch.tensor([[[-high, high]]]))
    assert torch.equal(lse, torch.full((1, 1, 2), high))
    assert torch.equal(o[0, 0, :, 0], torch.tensor([1.0, 0.0]))


def test_a_nan_in_a_part_is_not_hidden_by_the_merge() -> None:
    o, lse = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1)
    merge_(o, lse, torch.full((1, 1, 1, 4), torch.nan), torch.full((1, 1, 1), torch.nan))
    assert torch.isnan(o).all()
    assert torch.isnan(lse).all()


def test_large_logits_round_the_ring_are_those_of_fp64() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(3))
    q = q * 3e3

    def work(cp: CPContext) -> Tensor:
        rows = slice(8 * cp.rank, 8 * cp.rank + 8)
        parts = (x[:, :, rows].contiguous() for x in (q, k, v))
        return ring_attention(*parts, cp=cp, scale=1.0)

    found = torch.cat(CPContext.local(4, layout="contiguous").run(work), dim=2)
    exact, _ = reference.attention(q.double(), k.double(), v.double(), mask="causal", scale=1.0)
    baseline = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert_within_budget("o", found, exact, baseline)


# Planted faults: each check above is shown to fail.


def wrong_plans(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the ops execute plans whose steps went through `change`."""

    right = nxd_cp.ops.plan_for

    def planted(*arguments: Any) -> Any:
        plan = right(*arguments)
        steps = tuple(tuple(change(step) for step in mine) for mine in plan.steps)
        return dataclasses.replace(plan, steps=steps)

    monkeypatch.setattr(nxd_cp.ops, "plan_for", planted)


def test_a_wrong_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal_for_strict(step: Step) -> Step:
        tiles = tuple(dataclasses.replace(tile, mask="causal") for tile in step.tiles)
        return dataclasses.replace(step, tiles=tiles)

    wrong_plans(monkeypatch, causal_for_strict)
    case = Case(layout="striped", size=2)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_a_dropped_hop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_plans(monkeypatch, lambda step: dataclasses.replace(step, kv=None))
    case = Case(size=2)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case, check_ranks=False))


def test_gradients_that_do_not_come_home_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_home(step: Step) -> Step:
        return dataclasses.replace(step, grad=None) if step.index == 0 else step

    wrong_plans(monkeypatch, not_home)
    with pytest.raises(RuntimeError, match="different order"):
        all_ranks_locally(Case(size=3))


def test_swapped_dk_and_dv_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchBackend.backward

    def swapped(self: TorchBackend, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = right(self, *tensors, **options)
        return dq, dv, dk

    monkeypatch.setattr(TorchBackend, "backward", swapped)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(Case(size=2), all_ranks_locally(Case(size=2)))


def test_a_stale_block_is_caught_in_debug_mode() -> None:
    def work(cp: CPContext) -> Tensor:
        step = make_plan("contiguous", 2, 2, causal=False).steps[cp.rank][0]
        with cp.transport.call("test") as call:
            parcel = call.parcel("kv", (4,), torch.float32, torch.device("cpu"))
            stale = parcel.payload.fill_(cp.rank)
            fresh = call.start(parcel, step.kv).wait()
            assert torch.equal(fresh, torch.full((4,), 1.0 - cp.rank))
            return stale

    with debug():
        assert all(torch.isnan(stale).all() for stale in CPContext.local(2).run(work))
    assert not any(torch.isnan(stale).any() for stale in CPContext.local(2).run(work))


def test_a_skipped_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hop, "wait", lambda self: self.parcel.payload)
    with pytest.raises(RuntimeError, match="nobody waited"):
        all_ranks_locally(Case(size=2), check_ranks=False)


def test_an_error_in_one_ranks_block_ends_the_others_and_the_group_works_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: TorchBackend, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if threading.current_thread().name == "cp-rank-1":
            raise ZeroDivisionError("planted in rank 1")
        return right(self, *tensors, **options)

    right = TorchBackend.forward
    case, group = Case(size=3), CPContext.local(3)
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "forward", broken)
        with pytest.raises(ZeroDivisionError, match="planted in rank 1"):
            group.run(lambda cp: one_rank(cp, case))
    check_fp32(case, join_all(group.run(lambda cp: one_rank(cp, case)), case))
