"""Sinks, soft-capping, windows to both sides, more keys than queries, lengths that do not divide,
cumulative lengths, and values of another head dim: the ring against fp64.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import assert_within_budget
from cases import (
    Case,
    all_ranks_locally,
    check_fp32,
    cut,
    inputs,
    join_all,
    one_device,
    one_rank,
    truth,
)
from ranks import RankGroup
from torch import Tensor

from nxd_cp import documents, ring
from nxd_cp.attention import ring_attention
from nxd_cp.backends import torch_bounded, torch_flash
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import LAYOUTS

MASKS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 9},
    {"causal": False, "window": (5, 3)},
    {"causal": False, "window": (None, 4)},
    {"causal": False, "window": (6, None)},
]
FEATURES: list[dict[str, Any]] = [
    {"sinks": True},
    {"softcap": 2.0},
    {"sinks": True, "softcap": 2.0},
    {"S": 41},
    {"S": 5},
    {"S": 21, "Skv": 50},
    {"S": 37, "Skv": 14},
    {"S": 40, "lengths": (1, 24, 15)},
    {"S": 43, "lengths": (7, 7, 0, 29), "sinks": True},
    {"S": 43, "lengths": (7, 7, 0, 29), "by_id": True, "softcap": 2.0},
    {"D": 24, "Dv": 16, "S": 33},
    {"D": 16, "Dv": 24, "softcap": 2.0},
]


def grid() -> list[Case]:
    """Every mask with every feature, each in every layout, on 1 to 8 ranks in turn."""
    cases = []
    sizes = random.Random(3).choices([1, 2, 3, 4, 5, 8], weights=[1, 3, 3, 3, 1, 1], k=1000)
    heads = ((3, 3), (6, 3), (4, 1))
    for mask in MASKS:
        for feature in FEATURES:
            for layout in LAYOUTS:
                Hq, Hkv = heads[len(cases) % 3]
                size = sizes[len(cases)]
                cases.append(Case(layout=layout, size=size, Hq=Hq, Hkv=Hkv, **(mask | feature)))
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_fp32_outputs_and_gradients_are_those_of_fp64(case: Case) -> None:
    with debug():
        check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("case", [c for c in grid() if c.layout == "zigzag"][::3], ids=str)
def test_the_plain_path_of_other_devices_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flash, "has_flash", lambda q: False)
    monkeypatch.setattr(torch_flash, "_QUERY_BLOCK", 7)
    monkeypatch.setattr(torch_bounded, "_QUERY_BLOCK", 5)
    check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bit_error_is_that_of_one_device(layout: str, dtype: torch.dtype) -> None:
    cases = (
        Case(layout, 4, False, S=203, Hq=6, Hkv=3, D=64, dtype=dtype, window=(30, 20)),
        Case(layout, 3, S=100, Skv=171, Hq=4, Hkv=1, D=64, dtype=dtype),
        Case(layout, 3, S=150, lengths=(13, 100, 37), D=64, dtype=dtype),
    )
    for case in cases:
        results = zip(
            case.names, all_ranks_locally(case), truth(case), one_device(case), strict=True
        )
        for name, x, y, baseline in results:
            assert x.dtype == dtype
            assert_within_budget(f"{case} {name}", x, y, baseline)


def over_gloo(group: dist.ProcessGroup, cases: list[Case]) -> list[Any]:
    return [one_rank(CPContext.from_group(group, layout=c.layout), c) for c in cases]


def test_processes_agree_with_fp64(ranks: RankGroup) -> None:
    cases = [
        Case(layout=layout, size=3, **{"S": 40, **feature})
        for layout in LAYOUTS
        for feature in FEATURES[:: len(FEATURES) // 4]
    ]
    for case, *results in zip(cases, *ranks.run(over_gloo, cases, num_ranks=3), strict=True):
        check_fp32(case, join_all(results, case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_bitwise_equal(layout: str) -> None:
    for feature in FEATURES:
        case = Case(layout=layout, size=3, **feature)
        first, second = all_ranks_locally(case), all_ranks_locally(case)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# What the options mean, on one device


def heads(H: int, S: int, D: int = 16) -> Tensor:
    return torch.randn(1, H, S, D)


def test_a_sink_is_a_key_with_value_zero() -> None:
    q, k, v, sinks = heads(2, 5), heads(2, 5), heads(2, 5), torch.randn(2)
    o, lse = ring_attention(q, k, v, sinks=sinks, causal=False, return_lse=True)
    s = torch.cat([q @ k.transpose(-1, -2) / 4, sinks.view(1, 2, 1, 1).expand(1, 2, 5, 1)], dim=-1)
    torch.testing.assert_close(o, s.softmax(-1)[..., :5] @ v)
    torch.testing.assert_close(lse, s.logsumexp(-1))


def test_a_very_low_sink_is_none_and_a_very_high_one_takes_all() -> None:
    q, k, v = heads(2, 5), heads(2, 5), heads(2, 5)
    o = ring_attention(q, k, v)
    for low in (-3e4, -torch.inf):
        assert torch.equal(ring_attention(q, k, v, sinks=torch.full((2,), low)), o)
    taken = ring_attention(q, k, v, sinks=torch.full((2,), 3e4))
    assert torch.equal(taken, torch.zeros_like(o))


def test_rows_that_see_no_key_have_the_lse_of_their_sink() -> None:
    q, k, v = heads(2, 4), heads(2, 1), heads(2, 1)  # only the last query sees the key
    _, lse = ring_attention(q, k, v, return_lse=True)
    assert torch.equal(lse[:, :, :3], torch.full((1, 2, 3), -torch.inf))
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    o, lse = ring_attention(q, k, v, sinks=sinks, return_lse=True)
    assert torch.equal(lse[0, :, 0], sinks.detach())
    o[:, :, :3].sum().backward()
    assert torch.equal(sinks.grad, torch.zeros(2))


def test_the_last_query_sees_the_last_key() -> None:
    q, k, v = heads(2, 6), heads(2, 9), heads(2, 9)
    whole = ring_attention(torch.cat([heads(2, 3), q], dim=2), k, v)
    torch.testing.assert_close(ring_attention(q, k, v), whole[:, :, 3:], rtol=0, atol=1e-6)


def test_a_softcap_bounds_the_scores() -> None:
    q, k, v = (heads(2, 8) for _ in range(3))
    _, lse = ring_attention(q * 1e4, k, v, softcap=5.0, causal=False, return_lse=True)
    assert float(lse.abs().max()) <= 5.0 + torch.tensor(8.0).log()
    torch.testing.assert_close(
        ring_attention(q, k, v, softcap=1e4), ring_attention(q, k, v), rtol=0, atol=1e-6
    )


# Planted faults


def test_sinks_merged_twice_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring._merge_sinks_
    monkeypatch.setattr(ring, "_merge_sinks_", lambda *a: (right(*a), right(*a)))
    case = Case(sinks=True)
    with pytest.raises(AssertionError, match=r"o: .*expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_a_sink_gradient_of_the_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring._sink_gradients
    monkeypatch.setattr(ring, "_sink_gradients", lambda *a: -right(*a))
    case = Case(sinks=True)
    with pytest.raises(AssertionError, match=r"dsinks: .*expected max"):
        check_fp32(case, all_ranks_locally(case))


def test_padding_that_is_read_is_caught() -> None:
    case = Case(size=2, S=41)
    with pytest.raises(AssertionError):
        check_fp32(case, join_all(CPContext.local(2).run(lambda cp: unaware(cp, case)), case))


def unaware(cp: CPContext, case: Case) -> tuple[Tensor, ...]:
    """The ring without the word that some slots are padding."""
    q, k, v, do = (cut(x, case, cp.rank).requires_grad_() for x in inputs(case))
    o = ring_attention(q, k, v, cp=cp)
    o.backward(do.detach())
    return o.detach(), q.grad, k.grad, v.grad


def test_a_window_without_its_right_end_is_caught() -> None:
    case = Case(causal=False, window=(5, 3))
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(Case(causal=False, window=(5, None))))


def test_ids_of_another_layout_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = documents.ids_of_ranks
    monkeypatch.setattr(documents, "ids_of_ranks", lambda *a: right(*a)[::-1])
    case = Case(S=40, lengths=(1, 24, 15))
    with pytest.raises(AssertionError, match="expected max"):
        check_fp32(case, all_ranks_locally(case))
