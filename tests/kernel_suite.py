"""The generated kernel cases: every pair of features on every generation, and lists by hand.

Does: make cases from a seed (`generate`), list shapes of public suites (`PUBLIC`), and say which
pairs of features a list covers. Does not: run a case (`kernel_cases.check`).

Letters as in kernel_cases.py.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from kernel_cases import KernelCase

GENERATIONS = ("gen2", "gen3", "gen4")
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


def _public() -> tuple[list[KernelCase], dict[KernelCase, float]]:
    """Shapes of public suites, lengths cut for a CPU; each on one generation in turn.

    Also the tolerance, absolute and relative, of cases whose suite states one for both outputs and
    gradients at such inputs (standard normal).
    """
    half, bf16 = torch.float16, torch.bfloat16
    cases: list[dict[str, Any]] = [
        # nki-library, ring attention forward: (batch, heads, local length, head dim), lengths / 8,
        # two and four ranks, ragged 576 and 4160, head dim 16, several groups of ranks.
        *({"mask": "causal", "S": 512, "K": 512 * n, "hops": n, "D": 128} for n in (2, 4)),
        {"mask": "causal", "S": 1024, "K": 1024, "D": 128, "Hq": 1, "Hkv": 1},
        {"mask": "full", "S": 1280, "K": 1280, "D": 128, "Hq": 1, "Hkv": 1, "hops": 4},
        *({"mask": "causal", "S": s, "K": 2 * s, "hops": 2, "D": 128} for s in (72, 576, 520)),
        {"mask": "strict", "S": 512, "K": 512, "D": 128},
        {"mask": "strict", "S": 256, "K": 256, "D": 16},
        {"mask": "documents", "S": 1024, "K": 1024, "D": 128, "hops": 4, "Hq": 1, "Hkv": 1},
        {"mask": "causal", "S": 288, "K": 576, "hops": 2, "D": 128, "Hq": 6, "Hkv": 6},
        # nki-library, ring attention backward: two heads of 128, none, causal and striped.
        *(
            {"mask": m, "S": 1024, "K": 1024, "D": 128, "Hq": 2, "Hkv": 2, "dtype": half}
            for m in ("full", "causal", "strict")
        ),
        # TransformerEngine, attention with context parallelism: 12 heads, 2 and 12 of keys, d 128;
        # MLA 192 and 128; window 512 of 4096. Lengths / 16. Tolerances:
        # tests/pytorch/attention/run_attention_with_cp.py at commit 015d225.
        *(
            {"mask": "causal", "S": 256, "K": 256, "D": 128, "Hq": 12, "Hkv": g, "dtype": d}
            | {"B": 2, "tolerance": tolerance}
            for g, d, tolerance in ((12, bf16, 2.5e-2), (2, bf16, 3.5e-2), (2, half, 5e-3))
        ),
        {"mask": "causal", "S": 256, "K": 256, "D": 192, "E": 128, "Hq": 12, "Hkv": 12}
        | {"tolerance": 2.5e-2},
        {"mask": "window", "S": 256, "K": 512, "D": 128, "Hq": 12, "Hkv": 2, "hops": 2}
        | {"tolerance": 3.5e-2},
        # ring-flash-attention: 3816 / 8 and 3824 / 8 tokens, 5 heads of 128, bf16; packed
        # documents with cuts at 0, 120, 1248, 4232 (/ 8) and at 0, 7, 14, 16.
        *(
            {"mask": "causal", "S": s, "K": s, "D": 128, "Hq": 5, "Hkv": 5, "dtype": bf16}
            for s in (477, 478)
        ),
        {"mask": "documents", "S": 529, "K": 529, "D": 128, "Hq": 5, "Hkv": 5, "dtype": bf16},
        {"mask": "documents", "S": 16, "K": 16, "D": 128, "Hq": 5, "Hkv": 5, "dtype": bf16},
        # PyTorch, ring attention through scaled_dot_product_attention: 8 heads of 32, 64 tokens.
        *(
            {"mask": m, "S": 64, "K": 64, "D": 32, "Hq": 8, "Hkv": 8, "B": 8, "dtype": d}
            for m in ("full", "causal")
            for d in (torch.float32, bf16)
        ),
    ]
    found, tolerances = [], {}
    for index, levels in enumerate(cases):
        levels["generation"] = GENERATIONS[index % 3]
        levels.setdefault("E", levels["D"])
        levels.setdefault("dtype", bf16)
        tolerance = levels.pop("tolerance", None)
        found.append(KernelCase(**levels, seed=index))
        if tolerance is not None:
            tolerances[found[-1]] = tolerance
    return found, tolerances


PUBLIC, TOLERANCES = _public()
