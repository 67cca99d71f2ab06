"""For every rule of the simulator one kernel with a good and a bad argument.

    @pair("nc_matmul.moving_free", good=512, bad=513)
    def moving(columns):
        ...
        nisa.nc_matmul(dst, stationary, moving)  # bad

The good call breaks no rule at all, of either tier; the bad one breaks this rule, at the line that
says so. tests/test_nki_rule_pairs.py runs them, and fails for a rule without a pair.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxd_cp.simulators.nki_api import Kernel, simulate_ranks

Launch = Callable[[Callable[..., Any], Any, str], Any]


def alone(kernel, choice, generation):
    """On one core."""
    return Kernel(kernel, generation)(choice)


def cores(kernel, choice, generation):
    """On the two cores of a rank."""
    return Kernel(kernel, generation)[2](choice)


def on_ranks(count, lnc=1):
    """On several ranks."""

    def launch(kernel, choice, generation):
        return simulate_ranks(kernel, [(choice,)] * count, lnc=lnc, generation=generation)

    return launch


def chosen(kernel, choice, generation):
    """The choice is the kernel: good and bad differ in their text."""
    return Kernel(choice, generation)()


@dataclass(frozen=True)
class Pair:
    """A kernel, its good and its bad argument, and the generation of each call."""

    rule: str
    kernel: Callable[..., Any]
    good: Any
    bad: Any
    generation: str
    good_generation: str
    launch: Launch


PAIRS: dict[str, Pair] = {}


def pair(
    rule: str,
    good: Any,
    bad: Any,
    generation: str = "gen3",
    good_generation: str = "",
    launch: Launch = alone,
):
    """Register the decorated kernel as the pair of a rule."""

    def register(kernel):
        assert rule not in PAIRS, f"{rule} has two pairs"
        best = good_generation or generation
        PAIRS[rule] = Pair(rule, kernel, good, bad, generation, best, launch)
        return kernel

    return register


def load_pairs() -> dict[str, Pair]:
    """All pairs, from every module of this package."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        importlib.import_module(f"{__name__}.{path.stem}")
    return PAIRS
