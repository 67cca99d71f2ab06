"""The running result of a ring of kernels: carried, not merged in a pass of its own.

How often o and dq are read and written is counted twice: in the kernels, from the simulator's log,
and outside, as PyTorch's operators. Letters: S local rows, D and E head dims of q, k and of v.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from budgets import HOPS_FACTOR, assert_within_budget, error
from cases import NAMES, Case, check_fp32, cut, inputs, join_all, one_device, one_rank, truth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nxd_cp import ring
from nxd_cp.backends.base import Documents, QueryRows, Scores
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.merging import merge_
from nxd_cp.running import Running
from nxd_cp.schedule import Bounded, make_plan
from nxd_cp.simulators.nki_api import Log, record

S, D, E, HQ, HKV = 128, 32, 48, 2, 1


class Passes(TorchDispatchMode):
    """Names of operators that read or write an fp32 tensor of `numel` numbers; views are none."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [x for x in (*args, found) if isinstance(x, Tensor)]
        if not is_view and any(
            x.numel() == self.numel and x.dtype == torch.float32 for x in tensors
        ):
            self.names.append(func.__name__)
        return found


def hbm_bytes(log: Log, width: int) -> tuple[int, int]:
    """fp32 bytes that DMAs read from and write to HBM in rows of `width` numbers."""
    read = written = 0
    for one in log:
        for view, is_write in [(one.dst, True), *((source, False) for source in one.sources)]:
            if one.opcode != "dma_copy" or view is None or view.shape[-1] != width:
                continue
            if log.buffers[view.buffer].space == "hbm" and view.dtype == "float32":
                size = 4 * torch.Size(view.shape).numel()
                written, read = written + size * is_write, read + size * (not is_write)
    return read, written


def measure(
    layout: str, size: int, backend: KernelBackend, *, causal: bool = False
) -> list[dict[str, Any]]:
    """Of every rank: bytes of o and dq in the kernels, and PyTorch's operators on them outside."""
    plan = make_plan(layout, size, S * size, causal=causal)

    def on_each_rank(cp: CPContext) -> dict[str, Any]:
        make = torch.Generator().manual_seed(cp.rank)
        shapes = ((HQ, D), (HKV, D), (HKV, E), (HQ, E))
        q, k, v, do = (torch.randn(1, h, S, d, generator=make).bfloat16() for h, d in shapes)
        options: dict[str, Any] = {"plan": plan, "rank": cp.rank, "backend": backend, "scale": 0.2}
        found: dict[str, Any] = {"steps": sum(bool(s.tiles) for s in plan.steps[cp.rank])}
        with cp.transport.call("forward") as call, record() as log, Passes(HQ * S * E) as passes:
            o, lse = ring.forward(q, k, v, call=call, **options)
        found["o"], found["o outside"] = hbm_bytes(log, E), passes.names
        with cp.transport.call("backward") as call, record() as log, Passes(HQ * S * D) as passes:
            ring.backward(do, q, k, v, o.bfloat16(), lse, call=call, **options)
        found["dq"], found["dq outside"] = hbm_bytes(log, D), passes.names
        return found

    return CPContext.local(size, layout=layout).run(on_each_rank)


@pytest.mark.parametrize(("layout", "causal"), [("contiguous", False), ("striped", True)])
def test_a_hop_reads_the_output_once_and_writes_it_once(layout: str, causal: bool) -> None:
    o, dq, dk = (4 * heads * S * dim for heads, dim in ((HQ, E), (HQ, D), (HKV, D)))
    for found in measure(layout, 4, KernelBackend("simulate", "gen3"), causal=causal):
        assert found["o"] == (3 * o, 4 * o), "the first hop has nothing to read"
        assert found["o outside"] == []
        assert found["dq"] == (3 * dq, 4 * (dq + dk))
        assert found["dq outside"] == []


def test_zigzag_cuts_its_rows_once_and_joins_them_once() -> None:
    for rank, found in enumerate(
        measure("zigzag", 4, KernelBackend("simulate", "gen3"), causal=True)
    ):
        o = 4 * HQ * S * E
        halves = 3 - rank  # hops in which only the later half of the rows sees something
        assert found["o"] == (
            (3 - halves) * o + halves * o // 2,
            (4 - halves) * o + halves * o // 2,
        )
        assert found["o outside"] == (["cat.default"] if halves else [])


@pytest.mark.parametrize("num_tokens", [S * 2, S * 2 - 3])
@pytest.mark.parametrize("window", [None, S // 2])
def test_a_result_is_made_in_the_memory_given_whatever_lies_there(
    num_tokens: int, window: int | None
) -> None:
    plan = make_plan("zigzag", 2, 2 * S, num_tokens=num_tokens, window=window)
    make = torch.Generator().manual_seed(5)
    shapes = (HQ, D), (HKV, D), (HKV, E)
    tensors = [
        [torch.randn(1, H, S, dim, generator=make) for H, dim in shapes] for _ in range(plan.size)
    ]

    def work(cp: CPContext) -> None:
        memory = torch.full((1, HQ, S, E), torch.nan), torch.full((1, HQ, S), torch.nan)
        results = []
        for where in (None, memory):
            with cp.transport.call("forward") as call:
                options = {"plan": plan, "rank": cp.rank, "backend": TorchBackend(), "call": call}
                results.append(ring.forward(*tensors[cp.rank], scale=0.25, memory=where, **options))
        assert results[1][0] is memory[0]
        assert results[1][1] is memory[1]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)

    CPContext.local(2).run(work)


class MergesOutside(KernelBackend):
    """As it was before kernels carried: a merge in place after every hop."""

    carries = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, carry: Any = None, out: Any = None
    ) -> Any:
        o, lse, _ = super().forward(q, k, v, scores)
        if carry is None:
            return o, lse
        merge_(*carry, o, lse)
        return carry

    def as_carry(self, o: Tensor, lse: Tensor) -> Any:
        return o, lse

    def backward(
        self, rows: QueryRows, k: Tensor, v: Tensor, scores: Scores, carry: Any = None
    ) -> Any:
        dq, dk, dv = super().backward(rows, k, v, scores)
        return dq if carry is None else carry.add_(dq), dk, dv


def test_a_merge_outside_the_kernels_is_counted() -> None:
    for found in measure("contiguous", 4, MergesOutside("simulate", "gen3")):
        assert found["o outside"].count("lerp_.Tensor") == 3
        assert found["dq outside"].count("add_.Tensor") == 3


def ring_of_kernels(case: Case, generation: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """o and gradients of the whole sequence."""
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    group = CPContext.local(case.size, layout=case.layout)
    return join_all(group.run(lambda cp: one_rank(cp, case, backend="simulate")), case)


CASES = [
    Case("zigzag", 4, S=300, D=32, sinks=True),
    Case("zigzag", 3, S=290, D=32, window=70, softcap=20.0),
    Case("zigzag", 4, S=320, D=32, dtype=torch.bfloat16),
    Case("striped", 3, S=210, D=32, lengths=(50, 70, 90), dtype=torch.float16),
    Case("contiguous", 4, causal=False, S=260, Hq=6, Hkv=2, D=32, Dv=48),
    Case("zigzag", 2, S=260, D=32, lengths=(130, 20, 110), window=60),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_carried_ring_is_fp64_attention_bit_for_bit_the_same_each_time(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = ("gen2", "gen3", "gen4")[CASES.index(case) % 3]
    first, again = (ring_of_kernels(case, generation, monkeypatch) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if case.dtype == torch.float32:
        check_fp32(case, first)
        return
    for name, x, y, z in zip(case.names, first, truth(case), one_device(case), strict=True):
        assert_within_budget(name, x, y, z)


@pytest.mark.parametrize("backend", ["simulate", "torch"])
def test_a_result_that_is_not_carried_is_caught(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("striped", 2, S=64, D=16)
    group = CPContext.local(2, layout="striped")

    def run() -> tuple[Tensor, ...]:
        return join_all(group.run(lambda cp: one_rank(cp, case, backend=backend)), case)

    check_fp32(case, run())
    monkeypatch.setattr(Running, "take", lambda self, rows: None)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, run())


# The error of more hops, of the whole ring


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_error_of_a_carried_ring_does_not_grow_with_its_hops(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hops(dtype, monkeypatch)


def test_a_ring_that_rounds_its_output_at_every_hop_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Running.put

    def rounds(self: Running[Any], rows: slice, values: Any) -> None:
        right(self, rows, tuple(x.bfloat16().float() for x in values))

    monkeypatch.setattr(Running, "put", rounds)
    with pytest.raises(AssertionError, match=r"o: .* ranks, .* of one"):
        check_hops(torch.bfloat16, monkeypatch)


def check_hops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """AssertionError where more ranks than one have more than HOPS_FACTOR times its error.

    Outputs are rounded to 16 bits once; that would hide the hops, so they are taken in fp32.
    """
    shape: dict[str, Any] = {"causal": False, "S": 1024, "Hq": 1, "Hkv": 1, "D": 64}
    found = {}
    for size in (1, 2, 4, 8, 16):
        case = Case("contiguous", size, dtype=dtype, **shape)
        parts = ring_in_fp32(case)
        pairs = zip(parts, truth(case), strict=True)
        found[size] = [error(got, expected).relative_rms for got, expected in pairs]
    for size in (2, 4, 8, 16):
        for name, now, one in zip(NAMES, found[size], found[1], strict=True):
            assert now <= HOPS_FACTOR * one, f"{name}: {now} of {size} ranks, {one} of one"


def ring_in_fp32(case: Case) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of the whole sequence as the ring has them, before they are rounded."""
    plan = make_plan(case.layout, case.size, case.S, causal=case.causal)

    def on_each_rank(cp: CPContext) -> tuple[Tensor, ...]:
        q, k, v, do = (cut(x, case, cp.rank) for x in inputs(case))
        options: dict[str, Any] = {
            "plan": plan,
            "rank": cp.rank,
            "backend": KernelBackend("simulate", "gen3"),
            "scale": case.D**-0.5,
        }
        with cp.transport.call("forward") as call:
            o, lse = ring.forward(q, k, v, call=call, **options)
        with cp.transport.call("backward") as call:
            grads = ring.backward(do, q, k, v, o, lse, call=call, **options)[:3]
            return (o, *(x.clone() for x in grads))

    return join_all(CPContext.local(case.size, layout=case.layout).run(on_each_rank), case)


# Pieces


MASKS = ["full", Bounded(-40, 9), "documents", "causal", "strict"]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("edges", [(0, 30, 100), (0, 70), (30, 70), (0, 30, 70, 100)], ids=str)
def test_a_rectangle_cut_at_its_pieces_is_the_same(mask: Any, edges: tuple[int, ...]) -> None:
    """Pieces left by earlier rectangles, some rows with nothing, then one over all rows."""
    make = torch.Generator().manual_seed(3)
    q, k, v, k2, v2 = (torch.randn(1, 1, 100, 16, generator=make) for _ in range(5))
    if mask == "documents":
        ids = torch.arange(100)[None] // 37
        mask = Documents("causal", ids, ids)
    backend = TorchBackend()
    carried, whole = (Running(100, _nothing, in_place=in_place) for in_place in (False, True))
    for running in (carried, whole):
        for start, stop in pairwise(edges):
            attend(running, slice(start, stop), (q, k, v), "full", backend)
        attend(running, slice(0, 100), (q, k2, v2), mask, backend)
    for found, expected in zip(carried.finish(), whole.finish(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def _nothing(rows: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 1, rows, 16), torch.full((1, 1, rows), -torch.inf)


def attend(
    running: Running[Any], at: slice, tensors: tuple[Tensor, ...], mask: Any, backend: Any
) -> None:
    """One rectangle, as the ring does it; a carry is copied where the backend would change it."""
    q, k, v = tensors
    for rows, part in running.cut(at, mask):
        carry = running.take(rows)
        if carry is not None and not running._in_place:
            carry = tuple(x.clone() for x in carry)
        running.put(rows, backend.forward(q[:, :, rows], k, v, Scores(part, 0.25), carry))
