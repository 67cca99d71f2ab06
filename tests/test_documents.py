"""Packed documents: the ring against fp64 for every layout and mask, over threads and gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close, assert_within_budget
from cases import NAMES, Case, cut, inputs, join_all, rows
from ranks import RankGroup
from torch import Tensor

from nxd_cp import documents, reference, ring
from nxd_cp.attention import ring_attention
from nxd_cp.backends import torch_bounded, torch_flash
from nxd_cp.backends.base import Documents, QueryRows, Scores
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import LAYOUTS, Bounded, Mask, Plan, make_plan


def packed(lengths: Sequence[int], B: int, seq_len: int) -> Tensor:
    """Ids of documents of these lengths (the last fills the rest), shifted for each batch row."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = torch.cat([ids, ids.new_full((seq_len,), len(lengths))])[:seq_len]
    return torch.stack([ids.roll(5 * row) for row in range(B)])


PACKINGS = [(7, 7, 2), (1, 30, 3), (48,), tuple([1] * 48)]


def hidden(case: Case, ids: Tensor) -> Tensor:
    other = ids[:, None, :, None] != ids[:, None, None, :]
    return other | case.hidden()


def truth(case: Case, ids: Tensor) -> tuple[Tensor, ...]:
    q, k, v, do = (x.double() for x in inputs(case))
    options: dict[str, Any] = {"mask": hidden(case, ids), "scale": case.D**-0.5}
    o, _ = reference.attention(q, k, v, **options)
    return (o, *reference.attention_backward(do, q, k, v, **options))


def one_rank(cp: CPContext, case: Case, ids: Tensor) -> tuple[Tensor, ...]:
    q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mine = ids[:, rows(case.layout, case.size, cp.rank, case.S)]
    o = ring_attention(
        *leaves, cp=cp, causal=case.causal, window=case.window, segment_ids=mine.int()
    )
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))


def locally(case: Case, ids: Tensor) -> tuple[Tensor, ...]:
    group = CPContext.local(case.size, layout=case.layout)
    return join_all(group.run(lambda cp: one_rank(cp, case, ids)), case)


def check_fp32(case: Case, ids: Tensor, found: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(NAMES, found, truth(case, ids), strict=True):
        assert_close(f"{case} {name}", x, y, FP32_OUTPUT if name == "o" else FP32_GRADIENT)


GRID = [
    Case(layout=layout, size=size, causal=causal, B=2, S=48, Hq=Hq, Hkv=Hkv, window=window)
    for layout in LAYOUTS
    for size in (1, 2, 3, 4)
    for causal, window in ((True, None), (False, None), (True, 5), (True, 20))
    for Hq, Hkv in ((3, 3), (6, 3), (8, 1))
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_fp32_outputs_and_gradients_are_those_of_fp64(case: Case) -> None:
    with debug():
        for lengths in PACKINGS:
            ids = packed(lengths, case.B, case.S)
            check_fp32(case, ids, locally(case, ids))


def test_documents_longer_than_a_block_and_ids_in_any_order() -> None:
    case = Case(size=2, S=1200, window=400)
    for ids in (packed((300, 500), 1, 1200), torch.randint(-2, 3, (1, 1200))):
        check_fp32(case, ids, locally(case, ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_error_is_that_of_one_device(layout: str) -> None:
    case = Case(layout=layout, size=4, S=240, Hq=6, Hkv=3, D=64, dtype=torch.bfloat16)
    ids = packed((101, 30), 1, case.S)
    q, k, v, do = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=~hidden(case, ids), enable_gqa=True
    )
    o.backward(do)
    baselines = (o.detach(), *(x.grad for x in leaves))
    results = zip(NAMES, locally(case, ids), truth(case, ids), baselines, strict=True)
    for name, x, y, baseline in results:
        assert_within_budget(f"{case} {name}", x, y, baseline)


def over_gloo(group: dist.ProcessGroup, cases: list[Case], ids: Tensor) -> list[Any]:
    return [one_rank(CPContext.from_group(group, layout=c.layout), c, ids) for c in cases]


def test_processes_agree_with_fp64(ranks: RankGroup) -> None:
    cases = [
        Case(layout=layout, size=3, window=window) for layout in LAYOUTS for window in (None, 9)
    ]
    ids = packed((7, 20, 1), 1, 48)
    for case, *results in zip(cases, *ranks.run(over_gloo, cases, ids, num_ranks=3), strict=True):
        check_fp32(case, ids, join_all(results, case))


def test_it_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    ids = packed((3, 8), 1, 16)

    def loss(*x: Tensor) -> Tensor:
        return ring_attention(*x, segment_ids=ids).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("mask", ["full", "causal", "strict", Bounded(-4, 2)], ids=str)
def test_rows_without_a_document_in_a_rectangle_are_empty(
    mask: Mask, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_flash, "has_flash", lambda q: flash)
    monkeypatch.setattr(torch_bounded, "_QUERY_BLOCK", 7)
    q, k, v, do = (torch.randn(2, h, 20, 16) for h in (4, 2, 2, 4))
    q_ids, k_ids = packed((6, 9), 2, 20), packed((3, 5), 2, 20) + 1
    documents = Documents(mask, q_ids, k_ids)
    o, lse = TorchBackend().forward(q, k, v, Scores(documents, 0.25))
    unseen = q_ids[:, None, :, None] != k_ids[:, None, None, :]
    unseen |= reference.hidden(mask, 20, 20, q.device)
    exact = [x.double() for x in (q, k, v, do)]
    o_true, lse_true = reference.attention(*exact[:3], mask=unseen, scale=0.25)
    assert_close("o", o, o_true, FP32_OUTPUT)
    seen = ~unseen.all(-1).expand(lse.shape)
    assert torch.equal(lse > -torch.inf, seen)
    assert_close("lse", lse[seen], lse_true[seen], FP32_OUTPUT)
    found = TorchBackend().backward(
        QueryRows(do, q, o, lse, (do * o).sum(-1)), k, v, Scores(documents, 0.25)
    )
    expected = reference.attention_backward(exact[3], *exact[:3], mask=unseen, scale=0.25)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(name, x, y, FP32_GRADIENT)


def test_ids_of_the_wrong_rank_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring.gather
    monkeypatch.setattr(ring, "gather", lambda *arguments: right(*arguments)[::-1])
    case, ids = Case(size=2), packed((7, 20), 1, 48)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, ids, locally(case, ids))


def test_documents_that_see_each_other_are_caught() -> None:
    case, ids = Case(size=2), packed((7, 20), 1, 48)
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, ids, locally(case, torch.zeros_like(ids)))


def test_what_documents_spare_is_found_once_for_all_layers_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    right = documents._Seeker
    monkeypatch.setattr(documents, "_RECENT", documents._Recent(2))
    monkeypatch.setattr(documents, "_Seeker", lambda ids: asked.append(ids) or right(ids))
    plan = make_plan("zigzag", 4, 64)
    packings = [torch.tensor([0, end, 64]) for end in (8, 20, 40)]

    def spared(bounds: torch.Tensor) -> Plan:
        return documents.spared(plan, documents.ids_of_ranks(bounds, plan, torch.device("cpu")))

    first = spared(packings[0])
    assert all(spared(packings[0]) is first for _ in range(5))
    assert len(asked) == 1
    assert [spared(one) for one in packings[1:]] != [first, first], (
        "another packing is another plan"
    )
    assert len(asked) == 3
    assert spared(packings[0]) == first
    assert len(asked) == 4, "only the last few are kept"
