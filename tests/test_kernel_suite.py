"""A fixed sample of the generated kernel cases, the public shapes, and planted faults.

All cases: scripts/run_kernel_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from kernel_cases import NAMES, KernelCase, check
from kernel_public import PUBLIC, PublicCase, Tolerance
from kernel_suite import (
    FEATURES,
    GENERATIONS,
    generate,
    pairs,
    possible_pairs,
    valid,
)

from nxd_cp.backends.base import Documents, QueryRows, Scores
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.reference import attention, attention_backward
from nxd_cp.simulators.nki_api import NkiValidationError, load

SAMPLE = [case for g in GENERATIONS for _, case in generate(7, 0, g)[::9]]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_generated_case_and_its_gradients_are_those_of_fp64(case: KernelCase) -> None:
    check(case)


@pytest.mark.parametrize("case", PUBLIC[::6], ids=str)
def test_cases_of_public_suites_hold_their_tolerance_and_ours(case: PublicCase) -> None:
    case.check()


@pytest.mark.parametrize("part", ["output", "gradients"])
def test_a_tolerance_of_a_public_suite_that_does_not_hold_is_caught(part: str) -> None:
    case = next(c for c in PUBLIC if c.source == "PyTorch" and c.case.dtype == torch.bfloat16)
    narrow = replace(case, **{part: Tolerance(1e-5, 1e-6)})
    said = {"output": "o: not within", "gradients": "dq: .* above"}[part]
    with pytest.raises(AssertionError, match=said):
        narrow.check()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_generated_cases_hold_every_pair_of_features(generation: str) -> None:
    cases = generate(0, 210, generation)
    assert len(cases) >= 210
    assert all(valid(levels, generation) for levels, _ in cases)
    found = set().union(*(pairs(levels) for levels, _ in cases))
    assert found >= possible_pairs(generation)
    assert len({str(case) for _, case in cases}) == len(cases)
    names = {name for pair in found for name, _ in pair}
    assert names == set(FEATURES)


# Faults planted in the kernels: each is a function of a module, and what takes its place.


@dataclass(frozen=True)
class Fault:
    """`plant(right, module)` returns what `module.name` becomes; `case` must see it."""

    file: str
    name: str
    plant: Callable[[Any, Any], Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file}-{self.plant.__name__}"

    @property
    def case(self) -> KernelCase:
        plain = {"mask": "causal", "S": 300, "K": 300, "D": 32, "E": 48, "Hq": 4, "Hkv": 2}
        return KernelCase("gen3", **{**plain, **self.changes})


def forget_the_diagonal(right: Any, module: Any) -> Any:
    return lambda *tiles: None


def shift_the_diagonal(right: Any, module: Any) -> Any:
    return lambda tile, mask, gap, fill: right(tile, mask, gap - 1, fill)


def shift_the_interval(right: Any, module: Any) -> Any:
    return lambda dst, data, first, stop, start: right(dst, data, first, stop, start + 1)


def widen_the_interval(right: Any, module: Any) -> Any:
    def wrong(dst: Any, data: Any, first: Any, stop: Any, start: int) -> None:
        module.nisa.tensor_scalar(dst=stop, data=stop, op0=module.nl.add, operand0=1.0)
        right(dst, data, first, stop, start)
        module.nisa.tensor_scalar(dst=stop, data=stop, op0=module.nl.subtract, operand0=1.0)

    return wrong


def take_the_bounds_of_the_first_batch_element(right: Any, module: Any) -> Any:
    return lambda first, stop, b: right(first, stop, 0)


def skip_a_tile_that_is_seen(right: Any, module: Any) -> Any:
    return lambda units, mask, key_start: right(units, mask, key_start + 128)


def overwrite_the_accumulator(right: Any, module: Any) -> Any:
    """Accumulate flags: each key tile starts anew, as accumulate=False would have it."""

    def wrong(queries: Any, keys: Any, *rest: Any) -> Any:
        return right(queries, {**keys, "tiles": keys["tiles"][:1]}, *rest)

    return wrong


def never_subtract_the_shift(right: Any, module: Any) -> Any:
    return lambda *tiles: None


def subtract_a_rounded_shift(right: Any, module: Any) -> Any:
    def wrong(dst: Any, shift: Any, span: Any) -> None:
        pieces, ones = shift
        right(dst, (pieces, ones), span)
        right(dst, (pieces, ones), span)

    return wrong


def forget_the_ones_column(right: Any, module: Any) -> Any:
    def wrong(*place: Any) -> Any:
        keys = right(*place)
        values = keys["v1"]
        last = values.shape[2]
        module.nisa.memset(dst=values[:, :, last - 1 : last], value=2.0)
        return keys

    return wrong


def forget_the_carried_output(right: Any, module: Any) -> Any:
    return lambda acc, weights, carry, place: right(acc, weights, (), place)


def forget_the_carried_maximum_of_a_row_tile(right: Any, module: Any) -> Any:
    def wrong(carry: Any, b: int, block: Any) -> Any:
        statistics = right(carry, b, block)
        module.nisa.memset(dst=statistics[:, 1, 0:1], value=module.EMPTY_LSE)
        return statistics

    return wrong


def forget_the_carried_sum(right: Any, module: Any) -> Any:
    def wrong(carry: Any, b: int, block: Any) -> Any:
        statistics = right(carry, b, block)
        module.nisa.memset(dst=statistics[:, :, 1], value=1.0)
        return statistics

    return wrong


def forget_the_carried_statistics(right: Any, module: Any) -> Any:
    return lambda carry, b, block: right((), b, block)


def swap_the_weights(right: Any, module: Any) -> Any:
    return lambda acc, weights, carry, place: right(acc, weights[::-1], carry, place)


def give_both_cores_the_same_heads(right: Any, module: Any) -> Any:
    def wrong(num_batches: int, num_groups: int) -> Any:
        items = right(num_batches, num_groups)
        return [(0, 0)] * len(items)

    return wrong


def drop_half_of_the_contraction(right: Any, module: Any) -> Any:
    def wrong(dst: Any, stationary: Any, s_span: Any, moving: Any, m_span: Any) -> None:
        right(dst, stationary[:1], s_span, moving[:1], m_span)

    return wrong


def swap_key_gradients(right: Any, module: Any) -> Any:
    return lambda dk, dv, p, ds, rows, u: right(dv, dk, p, ds, rows, u)


def swap_key_gradients_of_odd_heads(right: Any, module: Any) -> Any:
    def wrong(dk: Any, dv: Any, p: Any, ds: Any, rows: Any, u: int) -> None:
        odd = rows["units"][u][0] % 2 == 1
        right(dk, dv, ds if odd else p, p if odd else ds, rows, u)

    return wrong


def scale_twice(right: Any, module: Any) -> Any:
    return lambda hbm, carried, psum, at, factor: right(hbm, carried, psum, at, factor * factor)


def forget_the_scale_of_dq(right: Any, module: Any) -> Any:
    return lambda rows, u, keys, start, ds, scale, eye: right(rows, u, keys, start, ds, 1.0, eye)


def forget_delta(right: Any, module: Any) -> Any:
    def wrong(rows: Any, *place: Any) -> Any:
        module.nisa.memset(dst=rows["delta"], value=0.0)
        return right(rows, *place)

    return wrong


def forget_the_slope_of_the_cap(right: Any, module: Any) -> Any:
    def wrong(*place: Any) -> Any:
        p, _ = right(*place)
        return p, p

    return wrong


def forget_the_carried_key_gradient(right: Any, module: Any) -> Any:
    return lambda hbm, carried, psum, at, factor: right(hbm, (), psum, at, factor)


def forget_the_carried_dq(right: Any, module: Any) -> Any:
    def wrong(places: Any, *rest: Any) -> None:
        right({**places, "dq_in": ()}, *rest)

    return wrong


def keep_the_sign_of_lse(right: Any, module: Any) -> Any:
    return lambda bias, lse: module.nisa.tensor_copy(dst=bias, src=lse)


HOPS = {"hops": 2, "mask": "full"}
PACKED_TWICE = {"mask": "documents", "B": 2}  # each batch element in another way
FAULTS = [
    Fault("probabilities", "cut_past_queries", forget_the_diagonal),
    Fault("probabilities", "cut_past_queries", shift_the_diagonal),
    Fault("shift", "cut_future_keys", forget_the_diagonal, {"gain": 3000.0}),
    Fault("flash_bwd", "cut_future_keys", forget_the_diagonal),
    Fault("flash_bwd", "cut_future_keys", shift_the_diagonal),
    Fault("probabilities", "keep_inside", shift_the_interval, {"mask": "window"}),
    Fault("shift", "keep_inside", shift_the_interval, {"mask": "window", "gain": 3000.0}),
    Fault("flash_bwd", "keep_inside", shift_the_interval, {"mask": "window"}),
    Fault("flash_bwd", "keep_inside", widen_the_interval, {"mask": "documents"}),
    Fault("flash_fwd", "load_bounds", take_the_bounds_of_the_first_batch_element, PACKED_TWICE),
    Fault("flash_bwd", "load_bounds", take_the_bounds_of_the_first_batch_element, PACKED_TWICE),
    Fault("flash_fwd", "units_that_reach", skip_a_tile_that_is_seen, {"S": 513, "K": 513}),
    Fault("flash_fwd", "attend", overwrite_the_accumulator, {"mask": "full"}),
    Fault("probabilities", "subtract_shift", never_subtract_the_shift, {"gain": 1000.0}),
    Fault("probabilities", "subtract_shift", subtract_a_rounded_shift, {"gain": 1000.0}),
    Fault("flash_fwd", "load_keys", forget_the_ones_column),
    Fault("finish", "merged_output", forget_the_carried_output, HOPS),
    Fault("finish", "carried_statistics", forget_the_carried_statistics, HOPS),
    Fault("finish", "carried_statistics", forget_the_carried_statistics, {"sink": True}),
    Fault("finish", "carried_statistics", forget_the_carried_maximum_of_a_row_tile, HOPS),
    Fault("finish", "carried_statistics", forget_the_carried_sum, HOPS),
    Fault("finish", "merged_output", swap_the_weights, HOPS),
    Fault("flash_fwd", "my_items", give_both_cores_the_same_heads, {"cores": 2}),
    Fault("probabilities", "contract", drop_half_of_the_contraction, {"D": 192, "E": 128}),
    Fault("flash_bwd", "contract", drop_half_of_the_contraction, {"D": 64, "E": 192}),
    Fault("flash_bwd", "add_key_gradients", swap_key_gradients, {"E": 32}),
    Fault("flash_bwd", "add_key_gradients", swap_key_gradients_of_odd_heads),
    Fault("flash_bwd", "store_key_gradient", scale_twice),
    Fault("flash_bwd", "add_query_gradient", forget_the_scale_of_dq),
    Fault("flash_bwd", "score_gradient", forget_delta),
    Fault("flash_bwd", "recompute_p", forget_the_slope_of_the_cap, {"softcap": 20.0, "gain": 9.0}),
    Fault("flash_bwd", "store_key_gradient", forget_the_carried_key_gradient, HOPS),
    Fault("flash_bwd", "load_unit", forget_the_carried_dq, HOPS),
    Fault("flash_bwd", "negate_lse", keep_the_sign_of_lse),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_planted_in_a_kernel_is_caught(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(fault.case)
    module = getattr(load("nxd_cp.kernels", generation="gen3"), fault.file)
    monkeypatch.setattr(module, fault.name, fault.plant(getattr(module, fault.name), module))
    with pytest.raises((AssertionError, NkiValidationError)):
        check(fault.case)


def test_scattered_documents_are_several_launches_and_still_exact() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, h, 200, 32, generator=make) for h in (2, 1, 1, 2))
    ids = torch.tensor([3, 1, 3, 7, 1]).repeat_interleave(40).unsqueeze(0)
    seen = (ids[:, :, None] == ids[:, None, :]).tril().unsqueeze(1)
    backend = KernelBackend("simulate", "gen3")
    scores = Scores(Documents("causal", ids, ids), 0.2)
    o, lse, _ = backend.forward(q, k, v, scores)
    grads = backend.backward(QueryRows(do, q, o, lse, (do * o).sum(-1)), k, v, scores)
    exact = [x.double() for x in (q, k, v)]
    truth = attention(*exact, mask=~seen, scale=0.2)[0]
    truths = (truth, *attention_backward(do.double(), *exact, mask=~seen, scale=0.2))
    same = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(
        *same, attn_mask=seen, scale=0.2, enable_gqa=True
    )
    plain.backward(do)
    plains = (plain.detach(), *(x.grad for x in same))
    for name, found, true, one in zip(NAMES, (o, *grads), truths, plains, strict=True):
        assert_within_budget(name, found, true, one)
