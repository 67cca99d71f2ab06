"""The error of attention does not depend on how many hops the keys are cut into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from budgets import HOPS_FACTOR, error
from kernel_cases import NAMES, KernelCase, by_kernels, exact, problem
from torch import Tensor

from nxd_cp.backends.neuron import KernelBackend

HOPS = (2, 4, 8, 16)
SHAPE = {"S": 128, "K": 2048, "Hq": 1}
MASKS = ("full", "offset", "window")
DIMS = (16, 32, 64, 80, 128, 192, 256)
CASES = [
    KernelCase(f"gen{2 + i % 3}", MASKS[(i + j) % 3], dtype, D=dim, E=dim, **SHAPE)
    for j, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32))
    for i, dim in enumerate(DIMS)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_does_not_grow_with_the_number_of_hops(case: KernelCase) -> None:
    check_hops(case)


def test_a_carry_that_is_rounded_at_every_hop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KernelBackend.forward

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        o, *statistics = right(*args, **options)
        return o.bfloat16().float(), *statistics

    monkeypatch.setattr(KernelBackend, "forward", wrong)
    with pytest.raises(AssertionError, match=r"o: .* hops, .* after one"):
        check_hops(KernelCase(D=128, E=128, **SHAPE))


def test_an_lse_that_is_carried_in_place_of_its_statistics_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = KernelBackend.forward

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        o, lse, _ = right(*args, **options)
        return o, lse

    monkeypatch.setattr(KernelBackend, "forward", wrong)
    with pytest.raises(AssertionError, match=r" hops, .* after one"):
        check_hops(KernelCase(D=16, E=16, **SHAPE))


def check_hops(case: KernelCase) -> None:
    """AssertionError where the error of more hops is more than HOPS_FACTOR that of one."""
    found = {}
    for hops in (1, *HOPS):
        cut_up = replace(case, hops=hops)
        x = problem(cut_up)
        o, _, grads = by_kernels(cut_up, x, before=0.0)
        o_true, _, true = exact(cut_up, x)
        pairs = zip((o, *grads), (o_true, *true), strict=True)
        found[hops] = [error(got, expected).relative_rms for got, expected in pairs]
    for hops in HOPS:
        for name, now, one in zip(NAMES, found[hops], found[1], strict=True):
            said = f"{name}: {now} after {hops} hops, {one} after one"
            assert now <= HOPS_FACTOR * one, said
