"""At most so many rows out of hundreds: spread over all and cheap, or drawn with a seed.

A row's cost is guessed from the numbers in its parameters (lengths, hidden sizes, heads): their
product. Rows that the clone's own conftest skips in simulation mode come last.

Some tests have a column of expected device times. It is left out of a row's name, and so of its
cost, of the file of outcomes and of the table.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"\d+")
_TIME = re.compile(r"cycles", re.IGNORECASE)
_TIME_IN_NAME = re.compile(r"[-_]?tpbSgCyclesSum[-_=]?[^-_\]]*", re.IGNORECASE)


def row_name(item: Any) -> str:
    """A pytest item's node id without expected times."""
    columns = getattr(getattr(item, "callspec", None), "params", {})
    if not any(_TIME.search(column) for column in columns):
        return _TIME_IN_NAME.sub("", item.nodeid)
    kept = [_word(value) for column, value in columns.items() if not _TIME.search(column)]
    return f"{item.nodeid.partition('[')[0]}[{'-'.join(kept)}]"


def _word(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def cost(row: str) -> float:
    """The product of the numbers in the brackets of a pytest node id; 1 without any."""
    product = 1.0
    for number in _NUMBER.findall(row.partition("[")[2]):
        product *= max(1, min(int(number), 10**6))
    return product


def sample(items: Sequence[Any], seed: str) -> list[Any]:
    """All `items` in an order drawn with `seed`; rows that the clone itself skips come last."""
    drawn = random.Random(seed).sample(list(items), len(items))
    return sorted(drawn, key=lambda item: item.get_closest_marker("skip") is not None)


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """All `items`, those to run first at the front: `limit` of them, spread over the cheapest
    quarter, cheapest first.

    Behind them the others, to take the place of rows that turn out to be skipped, cheapest first.
    """
    skipped = [i for i in items if i.get_closest_marker("skip") is not None]
    able = [i for i in items if i.get_closest_marker("skip") is None]
    ranked = sorted(able, key=lambda item: cost(row_name(item)))
    cheap = set(map(id, ranked[: max(limit, len(ranked) // 4)]))
    candidates = [i for i in able if id(i) in cheap]
    number = min(limit, len(candidates))
    chosen = {id(candidates[k * len(candidates) // number]) for k in range(number)}
    first = [i for i in ranked if id(i) in chosen]
    others = [i for i in ranked if id(i) not in chosen]
    return [*first, *others, *skipped]
