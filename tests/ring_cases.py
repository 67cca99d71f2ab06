"""Generated problems for the ring, end to end: every layout x mask x strategy x ring size, with the
rest drawn at random, each checked against fp64 in its outputs and all gradients.

Does: make case number i of a seed, run it on threads or gloo ranks, and judge it. Does not: choose
how many (`test_ring_cases.py` takes a sample, `scripts/run_ring_cases.py` all).

Note [What an error may be]
    The baseline is the same maths on one device: fp32 from the same rounded inputs, outputs and
    gradients rounded to the case's dtype, the backward with the rounded output, as flash attention
    on one device has it; and PyTorch's own attention where that can compute the case, the larger
    error of the two. Relative RMS error at most twice the baseline's, largest error at most four
    times, plus rounding steps (`budgets.py`). The gradient of a sink is one number per head, too
    few for an RMS: its error is at most four times the baseline's plus one fp32 rounding of the
    terms that are added up. A weight exp(s - lse) cannot be better than the rounding of its score,
    so nothing is held to less than one fp32 rounding of the largest visible score, times its own
    size: that matters where one device makes no error at all, because each query sees one key and
    its weight is 1. Where a gradient is exactly zero (each query sees one key) it may be as large
    as one fp32 rounding of the two equal terms whose difference it is. Nothing is fitted to what
    the ring does.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from budgets import MAX_FACTOR, RMS_FACTOR, error, rounding_step
from cases import Case, all_ranks_locally, inputs, join_all, one_rank, sinks_of, truth
from cases import one_device as torch_alone
from ranks import RankGroup
from torch import Tensor

from nxd_cp import reference
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.schedule import LAYOUTS
from nxd_cp.strategies import Strategy

MASKS = ("causal", "full", "window", "two-sided", "documents", "documents + window")
STRATEGIES = ("ring", "gather", "heads", "auto")
SIZES = tuple(range(1, 9))
COMBINATIONS = tuple(product(LAYOUTS, MASKS, STRATEGIES, SIZES))
NUM_CASES = 4 * len(COMBINATIONS)
GLOO_RANKS = 4


@dataclass(frozen=True)
class Generated:
    """A case, and where it runs: "threads", "gloo" or "all_to_all" (gloo without send)."""

    number: int
    mask: str
    where: str
    case: Case

    def __str__(self) -> str:
        return f"{self.number}-{self.where}-{self.case}"


@dataclass
class Verdict:
    """What came of a case. worst: the largest error over what is allowed, by tensor."""

    number: int
    name: str
    mask: str
    where: str
    layout: str
    strategy: str
    size: int
    dtype: str
    worst: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def make_case(number: int, seed: int = 0) -> Generated:
    """Case `number` of `seed`; always equal."""
    layout, mask, strategy, size = COMBINATIONS[number % len(COMBINATIONS)]
    draw = random.Random(f"{seed} {number}")
    num_tokens = draw.randrange(max(8, 2 * size), 97)
    group, num_kv_heads = draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 4))
    if strategy == "heads" and size > 1:
        num_kv_heads = draw.choice([heads for heads in range(2, 9) if math.gcd(heads, size) > 1])
    together = draw.choice((None, 1, 2)) if strategy in ("ring", "gather") else None
    options: dict[str, Any] = {}
    if mask in ("window", "documents + window"):
        options["window"] = draw.randrange(1, num_tokens + 2)
    if mask == "two-sided":
        ends = [None, *range(0, num_tokens, 5)]
        options["window"] = (draw.choice(ends), draw.choice(ends[1:]))
    if mask.startswith("documents"):
        options["lengths"] = _lengths(draw, num_tokens)
        options["by_id"] = draw.random() < 0.5
    elif draw.random() < 0.2:
        options["Skv"] = draw.randrange(max(8, 2 * size), 97)
    if draw.random() < 0.3:
        options["softcap"] = draw.choice((0.5, 2.0, 30.0))
    if draw.random() < 0.2:
        options["Dv"] = draw.choice((8, 24))
    case = Case(
        layout=layout,
        size=size,
        causal=mask not in ("full", "two-sided") and (mask != "documents" or draw.random() < 0.5),
        B=draw.choice((1, 2)),
        S=num_tokens,
        Hq=group * num_kv_heads,
        Hkv=num_kv_heads,
        D=draw.choice((8, 16, 40, 64)),
        dtype=draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        sinks=draw.random() < 0.3,
        strategy=Strategy(strategy, heads_per_round=together),
        **options,
    )
    where = "threads"
    if 2 <= size <= GLOO_RANKS and draw.random() < 0.15:
        where = draw.choice(("gloo", "all_to_all"))
    return Generated(number, mask, where, case)


def _lengths(draw: random.Random, total: int) -> tuple[int, ...]:
    """Documents of any length, one token too, that fill the sequence."""
    cuts = sorted(draw.sample(range(1, total), draw.randrange(0, min(6, total - 1))))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def run_case(generated: Generated, ranks: RankGroup | None) -> tuple[Tensor, ...]:
    """The whole sequence's o and gradients; every third case with debug checks."""
    case = generated.case
    if generated.where == "threads":
        with debug(generated.number % 3 == 0):
            return all_ranks_locally(case)
    assert ranks is not None, "a case over gloo needs ranks"
    messages = "p2p" if generated.where == "gloo" else "all_to_all"
    return join_all(ranks.run(_on_gloo, case, messages, num_ranks=case.size), case)


def _on_gloo(group: dist.ProcessGroup, case: Case, messages: str) -> tuple[Tensor, ...]:
    cp = CPContext.from_group(group, layout=case.layout, strategy=case.strategy, messages=messages)
    return one_rank(cp, case)


def one_device(case: Case) -> tuple[list[Tensor], float]:
    """The baseline, and the largest sum over a head of the terms of dsinks, without their signs.

    See Note [What an error may be].
    """
    q, k, v, do = (x.float() for x in inputs(case))
    options: dict[str, Any] = {
        "mask": case.hidden(),
        "scale": case.D**-0.5,
        "softcap": case.softcap,
    }
    sinks = sinks_of(case)
    o, lse = reference.attention(q, k, v, sinks=sinks, **options)
    o = o.to(case.dtype)
    delta = (do * o.float()).sum(-1)
    grads = reference.block_backward(do, q, k, v, lse, delta, **options)
    results = [o, *(x.to(case.dtype) for x in grads)]
    if sinks is None:
        return results, 0.0
    terms = torch.exp(sinks.view(1, -1, 1) - lse) * delta
    return [*results, -terms.sum((0, 2))], float(terms.abs().sum((0, 2)).max())


def judge(generated: Generated, found: tuple[Tensor, ...]) -> Verdict:
    """Compare every tensor with fp64, by the measure of the baseline."""
    case = generated.case
    assert isinstance(case.strategy, Strategy), "generated cases have a Strategy"
    verdict = Verdict(
        generated.number,
        str(generated),
        generated.mask,
        generated.where,
        case.layout,
        case.strategy.name,
        case.size,
        str(case.dtype).removeprefix("torch."),
    )
    baselines, sum_of_terms = one_device(case)
    weight_error = _score_rounding(case)
    others = baselines
    if not case.sinks and case.softcap is None and case.Dv is None:
        others = list(torch_alone(case))
    for index, (name, x, y) in enumerate(zip(case.names, found, truth(case), strict=True)):
        got, baseline = error(x, y), baselines[index]
        allowed = max(error(baseline, y), error(others[index], y), key=lambda one: one.max_abs)
        eps = torch.finfo(baseline.dtype).eps
        step = eps * sum_of_terms if name == "dsinks" else rounding_step(y, baseline.dtype)
        if not y.any():
            step = _cancelled_terms(case)
        floor = 0.0 if name == "dsinks" else weight_error * float(y.abs().max())
        ratio = got.max_abs / max(MAX_FACTOR * allowed.max_abs + step, floor, 1e-30)
        if name != "dsinks" and y.any():
            rms = max(RMS_FACTOR * allowed.relative_rms + eps / 4, weight_error)
            ratio = max(ratio, got.relative_rms / rms)
        verdict.worst[name] = ratio
        if not ratio <= 1.0:
            verdict.problems.append(f"{name}: {got}; one device: {allowed}")
    return verdict


def _score_rounding(case: Case) -> float:
    """One fp32 rounding of the largest visible score: the relative error of a weight."""
    q, k, *_ = (x.double() for x in inputs(case))
    scores = q @ k.repeat_interleave(case.Hq // case.Hkv, 1).transpose(-1, -2) * case.D**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    largest = float(scores.masked_fill(case.hidden(), 0.0).abs().max())
    return torch.finfo(torch.float32).eps * largest


def _cancelled_terms(case: Case) -> float:
    """One fp32 rounding of do v^T, at its largest, times q or k and the scale."""
    q, k, v, do = inputs(case)
    product = float(do.float().norm(dim=-1).max() * v.float().norm(dim=-1).max())
    eps = torch.finfo(torch.float32).eps
    return eps * product * float(max(q.abs().max(), k.abs().max())) * case.D**-0.5


def check_case(generated: Generated, ranks: RankGroup | None) -> Verdict:
    """Run and judge; an exception is a problem too."""
    try:
        return judge(generated, run_case(generated, ranks))
    except (AssertionError, RuntimeError, ValueError) as problem:
        case = generated.case
        verdict = Verdict(
            generated.number,
            str(generated),
            generated.mask,
            generated.where,
            case.layout,
            str(case.strategy),
            case.size,
            str(case.dtype).removeprefix("torch."),
        )
        verdict.problems.append(f"{type(problem).__name__}: {str(problem)[:500]}")
        return verdict
