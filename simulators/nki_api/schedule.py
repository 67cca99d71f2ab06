"""kernel.with_schedule: edges between named instructions.

Instructions run in program order here whatever the edges say; checked is what a compiler checks
before it schedules: every name belongs to an instruction, and the edges have no cycle.

Source: nki/guides/how-to-scheduling-apis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

from .errors import blamed, fail, user_place
from .rules import documented
from .runtime import current

_SCHEDULE = documented(
    "kernel.schedule",
    "NKI scheduling APIs (with_schedule)",
    "edges are (consumer, producer or list of producers) of instruction names that the kernel "
    "uses, without a cycle",
)
NAME = "Kernel.with_schedule"


def edges_of(schedule: Iterable[Any]) -> dict[str, set[str]]:
    """Producers by consumer; raises for anything but pairs of names, and for a cycle."""
    edges: dict[str, set[str]] = {}
    for pair in schedule:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            fail(_SCHEDULE, NAME, f"{pair!r} is no pair")
        consumer, producers = pair
        many = list(producers) if isinstance(producers, (list, tuple)) else [producers]
        if not all(isinstance(name, str) for name in (consumer, *many)):
            fail(_SCHEDULE, NAME, f"{pair!r} holds something else than names")
        edges.setdefault(consumer, set()).update(many)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        fail(_SCHEDULE, NAME, f"a cycle: {' after '.join(error.args[1])}")
    return edges


def scheduled(function: Callable[..., Any], edges: dict[str, set[str]]) -> Callable[..., Any]:
    """`function`, whose instructions must then have every name that the edges use."""
    place = user_place()
    wanted = set(edges).union(*edges.values())

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        unknown = sorted(wanted - current(NAME).names)
        if unknown:
            with blamed(place, function):
                fail(_SCHEDULE, NAME, f"no instruction is called {', '.join(unknown)}")
        return result

    return run
