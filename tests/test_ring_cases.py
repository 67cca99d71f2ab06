"""A fixed sample of the generated cases; `scripts/run_ring_cases.py` runs all of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from budgets import HOPS_FACTOR, error
from cases import Case, all_ranks_locally, truth
from ranks import RankGroup
from ring_cases import COMBINATIONS, NUM_CASES, judge, make_case, run_case

from nxd_cp.backends.torch_flash import TorchBackend

SAMPLE = range(5, NUM_CASES, 47)


@pytest.mark.parametrize("number", SAMPLE)
def test_a_generated_case_is_as_good_as_one_device(number: int, ranks: RankGroup) -> None:
    generated = make_case(number)
    print(generated)
    verdict = judge(generated, run_case(generated, ranks))
    assert not verdict.problems, verdict.problems


def test_the_cases_hold_every_combination_and_are_always_the_same() -> None:
    cases = [make_case(number) for number in range(NUM_CASES)]
    assert cases == [make_case(number) for number in range(NUM_CASES)]
    assert cases != [make_case(number, seed=1) for number in range(NUM_CASES)]
    seen = Counter((g.case.layout, g.mask, g.case.strategy.name, g.case.size) for g in cases)
    assert set(seen) == set(COMBINATIONS)
    assert min(seen.values()) == NUM_CASES // len(COMBINATIONS)
    for wanted in ("gloo", "all_to_all"):
        assert sum(g.where == wanted for g in cases) > NUM_CASES // 100
    for has in (
        lambda c: c.sinks,
        lambda c: c.softcap,
        lambda c: c.Skv,
        lambda c: c.Dv,
        lambda c: c.by_id,
        lambda c: c.S % c.size,
        lambda c: c.Hq != c.Hkv,
        lambda c: c.dtype == torch.bfloat16,
    ):
        assert sum(bool(has(g.case)) for g in cases) > NUM_CASES // 20


def test_the_sample_touches_every_layout_mask_and_strategy() -> None:
    sample = [make_case(number) for number in SAMPLE]
    assert len({(g.case.layout, g.mask) for g in sample}) == 18
    assert {g.case.strategy.name for g in sample} == {"ring", "gather", "heads", "auto"}
    assert {g.case.size for g in sample} == set(range(1, 9))


def test_an_error_of_a_thousandth_in_one_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchBackend.backward

    def off(self: TorchBackend, *tensors: torch.Tensor, **options: object) -> object:
        dq, dk, dv = right(self, *tensors, **options)
        return dq, dk * 1.001, dv

    generated = make_case(next(n for n in range(NUM_CASES) if _is_plain(n)))
    assert not judge(generated, run_case(generated, None)).problems
    monkeypatch.setattr(TorchBackend, "backward", off)
    (problem,) = judge(generated, run_case(generated, None)).problems
    assert problem.startswith("dk: ")


def _is_plain(number: int) -> bool:
    generated = make_case(number)
    case = generated.case
    return generated.where == "threads" and case.dtype == torch.float32 and case.size == 3


@pytest.mark.parametrize("strategy", ["ring", "gather", "heads"])
@pytest.mark.parametrize("window", [None, 100])
def test_error_at_sixteen_ranks_is_that_at_two(strategy: str, window: int | None) -> None:
    errors = {}
    for size in (2, 16):
        case = Case(size=size, S=256, Hq=4, Hkv=2, D=32, window=window, strategy=strategy)
        found = all_ranks_locally(case)
        errors[size] = [error(x, y).relative_rms for x, y in zip(found, truth(case), strict=True)]
    for name, few, many in zip(("o", "dq", "dk", "dv"), errors[2], errors[16], strict=True):
        assert many <= HOPS_FACTOR * few, f"{name}: {many:.2e} at 16 ranks, {few:.2e} at 2"
