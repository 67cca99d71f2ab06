"""What the kernel cases allow: no more than a device's own roundings, and what people use.

The cases: kernel_cases.py, Note [Budget].
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from budgets import assert_within_budget, error
from kernel_cases import (
    NAMES,
    KernelCase,
    OneDevice,
    Problem,
    assert_as_good,
    by_kernels,
    check,
    exact,
    problem,
    summing_noise,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

tensor_engine = import_module("nxd_cp.simulators.nki_api.isa.tensor_engine")


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("terms", [16, 64, 128, 256])
def test_the_modelled_error_of_a_sum_is_that_of_adding_one_term_after_the_other(
    terms: int, mean: float
) -> None:
    make = torch.Generator().manual_seed(terms)
    a, b = torch.randn(2, 4000, terms, generator=make)
    products = a.double() * b.double() + mean
    total = torch.zeros(4000)
    for i in range(terms):
        total = (total.double() + products[:, i]).float()
    whole, size = products.sum(1), products.abs().sum(1)
    measured = (total - whole).square().mean().sqrt()
    modelled = summing_noise(whole, size, terms, make).square().mean().sqrt()
    assert 0.7 <= float(measured / modelled) <= 1.4


@pytest.mark.parametrize("mask", ["full", "causal", "strict"])
def test_the_modelled_error_is_that_of_pytorchs_flash_attention(mask: str) -> None:
    """In bf16; the baseline of the suite is no looser than an attention that people use."""
    case = KernelCase(mask=mask, dtype=torch.bfloat16)
    x = problem(case)
    accepted = by_pytorch(case)
    ours, truth = OneDevice(case, x).sample(), exact(case, x)
    names = zip((ours[0], *ours[2]), accepted, (truth[0], *truth[2]), strict=True)
    for low, flash, expected in names:
        assert error(low, expected).relative_rms <= 1.2 * error(flash, expected).relative_rms


def by_pytorch(case: KernelCase, given: Problem | None = None) -> tuple[torch.Tensor, ...]:
    """o, dq, dk and dv of scaled_dot_product_attention, in the case's dtype."""
    x = problem(case) if given is None else given
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    rows, keys = slice(None), slice(None)
    if case.mask == "strict":
        rows, keys = slice(1, None), slice(None, -1)
    o = torch.zeros_like(q)
    o[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, rows],
        k[:, :, keys],
        v[:, :, keys],
        is_causal=case.mask != "full",
        scale=case.scale,
        enable_gqa=True,
    )
    o.backward(x.do)
    return o.detach(), q.grad, k.grad, v.grad


class OneTermAfterTheOther:
    """NumPy whose matmul adds in the order of the rows, as a column of TensorE's array does.

    A library's matmul adds q k^T and k q^T in different orders; an array of multipliers does not.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        total = np.zeros((a.shape[0], b.shape[1]), np.float32)
        for i in range(a.shape[1]):
            total += a[:, i : i + 1] * b[i : i + 1]
        if out is None:
            return total
        out[...] = total
        return out


@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("gain", [1.0, 9000.0])
def test_fp32_is_as_good_as_pytorchs_flash_attention_in_fp32(
    gain: float, mask: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where scores are 3e4 and an fp32 there has steps of 2**-9.

    p = exp(score - lse) is then as good as score and lse are the same in both directions. Few ties
    hold the error, so it is taken over eight blocks.
    """
    monkeypatch.setattr(tensor_engine, "np", OneTermAfterTheOther())
    found, accepted, truth = [], [], []
    for seed in range(8):
        case = KernelCase(generation, mask, S=128, K=128, gain=gain, Hkv=2, seed=seed)
        o, _, grads = by_kernels(case, problem(case))
        o_true, _, true = exact(case, problem(case))
        found.append(torch.stack((o, *grads)))
        truth.append(torch.stack((o_true, *true)))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            accepted.append(torch.stack(by_pytorch(case)))
    tensors = (torch.stack(x, dim=1) for x in (found, truth, accepted))
    for name, got, expected, flash in zip(NAMES, *tensors, strict=True):
        assert_within_budget(name, got, expected, flash)


def with_largest_ds(case: KernelCase, largest: float) -> Problem:
    """A problem with do so large that max |p * (do v^T - delta)| is this number; do is smaller."""
    x = problem(case)
    x = replace(x, v=8 * x.v)
    o, lse, _ = exact(case, x)
    p = torch.exp(x.q.double() @ x.k.double().mT * case.scale - lse.unsqueeze(-1))
    do = x.do.double()
    ds = p.masked_fill(~x.seen, 0.0) * (do @ x.v.double().mT - (do * o).sum(-1, keepdim=True))
    return replace(x, do=(do * largest / ds.abs().max()).to(case.dtype))


@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
def test_fp16_gradients_leave_its_range_where_pytorchs_do(generation: str) -> None:
    """dq and dk where a ds does; on gen2, whose transpose is a matmul, in all of its row tile."""
    case = KernelCase(generation, "causal", torch.float16, S=200, K=200, D=32, E=32, Hkv=2)
    largest = torch.finfo(torch.float16).max
    check(case, with_largest_ds(case, 0.9 * largest))
    given = with_largest_ds(case, 1.1 * largest)
    o, lse, grads = by_kernels(case, given)
    assert torch.isfinite(lse).all()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        accepted = by_pytorch(case, given)
    o_wrong, *wrong = ((~torch.isfinite(x.to(case.dtype))).any(-1) for x in (o, *grads))
    _, *accepted_wrong = ((~torch.isfinite(x)).any(-1) for x in accepted)
    assert not o_wrong.any()
    for name, found, expected in zip(NAMES[1:], wrong, accepted_wrong, strict=True):
        assert bool(expected.any()) == (name != "dv")
        if name == "dq" and generation == "gen2":
            expected = torch.stack([tile.any(-1) for tile in expected.split(128, dim=-1)], dim=-1)
            expected = expected.repeat_interleave(128, dim=-1)[..., : case.S]
        assert torch.equal(found, expected), name


def test_an_error_of_three_times_the_allowed_one_is_caught() -> None:
    case = KernelCase("gen3", dtype=torch.bfloat16)
    x = problem(case)
    check(case)
    truth, device = exact(case, x)[0], OneDevice(case, x)
    same = [device.sample()[0] for _ in range(4)]
    worst = max(error(o, truth).relative_rms for o in same) * float(truth.square().mean().sqrt())
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert_as_good("o", truth + worst * noise, truth, same)
    with pytest.raises(AssertionError, match="o: relative RMS"):
        assert_as_good("o", truth + 3 * worst * noise, truth, same)


def test_one_wrong_value_among_thousands_is_caught() -> None:
    case = KernelCase("gen3", dtype=torch.bfloat16)
    truth, device = exact(case, problem(case))[0], OneDevice(case, problem(case))
    wrong = device.sample()[0].clone()
    wrong[0, 0, 7, 3] += 0.02 * math.copysign(1.0, float(wrong[0, 0, 7, 3]))
    with pytest.raises(AssertionError, match="one device: max"):
        assert_as_good("o", wrong, truth, [device.sample()[0] for _ in range(4)])


@pytest.mark.parametrize("hops", [1, 3])
def test_a_few_roundings_too_many_are_caught_in_fp32(hops: int) -> None:
    """Nothing is added to twice the measured error: what hops round is part of it."""
    case = KernelCase("gen3", hops=hops)
    device = OneDevice(case, problem(case))
    o_true, lse_true, _ = exact(case, problem(case))
    samples = [device.sample() for _ in range(8)]
    for name, truth, same, steps in (
        ("o", o_true, [s[0] for s in samples], 14),
        ("lse", lse_true, [s[1] for s in samples], 5),
    ):
        assert_as_good(name, truth.float(), truth, same)
        with pytest.raises(AssertionError, match=f"{name}: relative RMS"):
            assert_as_good(name, truth * (1 + steps * 2.0**-24), truth, same)
