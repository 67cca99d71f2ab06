"""The error of attention does not depend on how many hops the keys are cut into.

Note [A carried lse]
    Between hops lse is one fp32 number, rounded to a step that is 2**-20 where lse lies from 8 to
    16. That is all that grows with hops: it moves the weight of the first h of n hops by its error,
    so that the lse after n hops is off by sqrt(n / 3) of one rounding, and o and the gradients by
    no more, relatively. Head dims of 128 and more, and p in 16 bits, have errors beside which it
    does not count; in fp32 with smaller head dims it adds to the error of one hop, as squares.
"""

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

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        o, lse = right(*args, **options)
        return o.bfloat16().float(), lse

    monkeypatch.setattr(KernelBackend, "forward", wrong)
    with pytest.raises(AssertionError, match=r"o: .* hops, .* after one"):
        check_hops(KernelCase(D=128, E=128, **SHAPE))


def test_an_lse_that_is_rounded_to_eight_times_its_step_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = KernelBackend.forward

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        o, lse = right(*args, **options)
        return o, (lse * 2**17).round() / 2**17

    monkeypatch.setattr(KernelBackend, "forward", wrong)
    with pytest.raises(AssertionError, match=r" hops, .* after one"):
        check_hops(KernelCase(D=16, E=16, **SHAPE))


def check_hops(case: KernelCase) -> None:
    """AssertionError where the error of more hops is more than HOPS_FACTOR that of one.

    In fp32 with head dims below 128: and what Note [A carried lse] says.
    """
    found, step = {}, 0.0
    for hops in (1, *HOPS):
        cut_up = replace(case, hops=hops)
        x = problem(cut_up)
        o, _, grads = by_kernels(cut_up, x, before=0.0)
        o_true, lse_true, true = exact(cut_up, x)
        step = rounding_of(lse_true)
        pairs = zip((o, *grads), (o_true, *true), strict=True)
        found[hops] = [error(got, expected).relative_rms for got, expected in pairs]
    for hops in HOPS:
        carried = 0.0
        if case.dtype == torch.float32 and case.D < 128:
            carried = (hops / 3) ** 0.5 * step
        for name, now, one in zip(NAMES, found[hops], found[1], strict=True):
            allowed = ((HOPS_FACTOR * one) ** 2 + carried**2) ** 0.5
            assert now <= allowed, f"{name}: {now} after {hops} hops, {one} after one"


def rounding_of(lse: Tensor) -> float:
    """RMS error of these numbers rounded to fp32: uniform within half a step."""
    _, exponent = torch.frexp(lse[lse > -torch.inf])
    return float(torch.exp2(exponent.double() - 24).square().mean().sqrt()) / 12**0.5
