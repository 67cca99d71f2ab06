"""The generated kernel cases: every pair of features on every generation, and lists by hand.

Does: make cases from a seed (`generate`), and say which pairs of features a list covers. Does not:
run a case (`kernel_cases.check`), or know shapes of other suites (`kernel_public.py`).

Letters as in kernel_cases.py.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from kernel_cases import KernelCase

GENERATIONS = ("gen2", "gen3", "gen4")
INTERVALS = ("window", "band", "offset", "documents")  # masks given by run-time intervals
LARGE = 8000.0  # scores up to about 3e4
LARGE_FP16 = 3000.0  # so that gradients stay in range

FEATURES: dict[str, tuple[Any, ...]] = {
    "mask": ("full", "causal", "strict", "window", "band", "offset", "documents"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "heads": ((2, 2), (4, 2), (4, 1), (3, 1), (5, 5), (6, 2), (8, 1)),
    "dims": (
        (16, 16),
        (32, 64),
        (64, 64),
        (80, 96),
        (128, 128),
        (128, 64),
        (160, 160),
        (192, 128),
        (256, 256),
    ),
    "length": (1, 7, 65, 128, 129, 200, 300, 513),
    "keys": ("equal", "more", "fewer"),
    "softcap": (None, 20.0, 50.0),
    "sink": (False, True),
    "hops": (1, 2, 3),
    "gain": (1.0, 30.0, LARGE),
    "bounded": (False, True),
    "B": (1, 2),
    "cores": (1, 2),
}

Levels = dict[str, Any]


def valid(levels: Levels, generation: str) -> bool:
    """Whether these (perhaps not all) levels can stand in one case."""

    def has(feature: str, *wanted: Any) -> bool:
        return feature in levels and levels[feature] in wanted

    square = has("mask", "documents")
    return not (
        (square and has("keys", "more", "fewer"))
        or (has("mask", "causal", "strict") and has("keys", "fewer"))
        or (has("length", 1) and has("keys", "fewer"))
        or (has("bounded", True) and has("dtype", torch.float16))
        or (has("bounded", True) and has("gain", 30.0, LARGE))
        or (has("cores", 2) and generation == "gen2")
        or (has("cores", 2) and has("heads", (3, 1), (5, 5)) and has("B", 1))
    )


def make_case(levels: Levels, generation: str, seed: int) -> KernelCase:
    """The case of one level per feature."""
    length = levels["length"]
    keys = {"equal": length, "more": length * 5 // 3 + 2, "fewer": max(1, length * 3 // 5)}
    gain = levels["gain"]
    if gain == LARGE and levels["dtype"] == torch.float16:
        gain = LARGE_FP16
    plain = {name: levels[name] for name in ("mask", "dtype", "softcap", "sink", "hops", "B")}
    return KernelCase(
        generation=generation,
        Hq=levels["heads"][0],
        Hkv=levels["heads"][1],
        S=length,
        K=keys[levels["keys"]],
        D=levels["dims"][0],
        E=levels["dims"][1],
        gain=gain,
        bounded=levels["bounded"],
        cores=levels["cores"],
        seed=seed,
        **plain,
    )


def pairs(levels: Levels) -> set[tuple[Any, ...]]:
    """All pairs of (feature, level)."""
    items = sorted((name, str(level)) for name, level in levels.items())
    return set(itertools.combinations(items, 2))


def possible_pairs(generation: str) -> set[tuple[Any, ...]]:
    """Every pair of levels that can stand in one case."""
    found = set()
    for (a, first), (b, second) in itertools.combinations(FEATURES.items(), 2):
        for one, other in itertools.product(first, second):
            if valid({a: one, b: other}, generation):
                found |= pairs({a: one, b: other})
    return found


def generate(seed: int, at_least: int, generation: str) -> list[tuple[Levels, KernelCase]]:
    """Cases of one generation that cover every possible pair, and at least so many."""
    rng = random.Random(f"{seed} {generation}")
    missing, cases = possible_pairs(generation), []
    while missing or len(cases) < at_least:
        found = max(
            (_random_levels(rng, generation, missing) for _ in range(12)),
            key=lambda levels: len(pairs(levels) & missing),
        )
        missing -= pairs(found)
        cases.append((found, make_case(found, generation, seed * 10_000 + len(cases))))
    return cases


def _random_levels(rng: random.Random, generation: str, missing: set[tuple[Any, ...]]) -> Levels:
    """One level per feature, begun with a pair that is still missing."""
    levels: Levels = {}
    if missing:
        wanted = rng.choice(sorted(missing))
        for name, text in wanted:
            levels[name] = next(level for level in FEATURES[name] if str(level) == text)
    names = [name for name in FEATURES if name not in levels]
    rng.shuffle(names)
    for name in names:
        options = [x for x in FEATURES[name] if valid({**levels, name: x}, generation)]
        levels[name] = rng.choice(options)
    return levels
