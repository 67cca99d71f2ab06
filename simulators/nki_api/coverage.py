"""Which instruction is simulated on which generation, and what is checked, read from the code.

    python -m nxd_cp.simulators.nki_api.coverage docs/simulator.md   # rewrites the page's tables

The rules of an instruction are those that its function can reach through the simulator's own
functions; its first generation is the number given to `need` on the way. Runs no instruction.
"""

from __future__ import annotations

import dis
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import chips, collectives, isa, language
from .isa.generation import need
from .rules import Rule

_PACKAGE = __name__.rpartition(".")[0]
_BEGIN, _END = "<!-- coverage -->", "<!-- end of coverage -->"
_COMMON = 0.4  # a rule that more than this share of the instructions can break is common


@dataclass(frozen=True)
class Coverage:
    """An instruction: its module, its first generation, and the ids of the rules it can break."""

    module: str
    name: str
    first_generation: int
    rules: frozenset[str]

    def runs_on(self, chip: chips.Chip) -> bool:
        """Whether this generation has it."""
        return chip.number >= self.first_generation


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _ours(value: Any) -> types.FunctionType | None:
    function = getattr(value, "__wrapped__", value)
    if isinstance(function, types.FunctionType) and function.__module__.startswith(_PACKAGE):
        return function
    return None


def _globals_used(function: types.FunctionType) -> list[Any]:
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    return [function.__globals__[name] for name in names if name in function.__globals__]


def _generation_needed(function: types.FunctionType) -> int:
    """The largest number that the function itself passes to `need`; 2 without such a call."""
    if need not in _globals_used(function):
        return 2
    numbers = [2]
    for code in _codes(function.__code__):
        steps = list(dis.get_instructions(code))
        for at, step in enumerate(steps):
            if step.opname.startswith("LOAD_GLOBAL") and step.argval == "need":
                after = [s.argval for s in steps[at : at + 6] if s.opname.startswith("LOAD_")]
                numbers += [v for v in after if type(v) is int]
    return max(numbers)


def coverage_of(module: str, name: str, function: Any) -> Coverage:
    """Follow `function` through the simulator's functions."""
    rules: set[str] = set()
    generation = 2
    start = _ours(function)
    assert start is not None, f"{module}.{name} is no function of the simulator"
    waiting, seen = [start], {start}
    while waiting:
        current = waiting.pop()
        generation = max(generation, _generation_needed(current))
        for value in _globals_used(current):
            if isinstance(value, Rule):
                rules.add(value.id)
                continue
            found = _ours(value)
            if found is not None and found not in seen:
                seen.add(found)
                waiting.append(found)
    return Coverage(module, name, generation, frozenset(rules))


def instructions() -> list[Coverage]:
    """Every function of nki.isa and nki.collectives that can break a rule."""
    found = []
    for label, module in (("isa", isa), ("collectives", collectives)):
        for name in module.__all__:
            value = getattr(module, name)
            if _ours(value) is not None and not isinstance(value, type):
                found.append(coverage_of(label, name, value))
    return [row for row in found if row.rules]


def language_names() -> list[str]:
    """Public functions of nki.language."""
    return sorted(n for n in language.__all__ if _ours(getattr(language, n)) is not None)


def tables() -> str:
    """The generated part of the page, as Markdown."""
    rows = instructions()
    counts = Counter(rule for row in rows for rule in row.rules)
    common = {rule for rule, count in counts.items() if count > _COMMON * len(rows)}
    names = [chip.generation for chip in chips.CHIPS.values()]
    lines = [
        f"{len(rows)} instructions. Checked for most of them: "
        + ", ".join(f"`{rule}`" for rule in sorted(common))
        + ".",
        "",
        f"| Instruction | {' | '.join(names)} | Its own checks |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for row in rows:
        on = ["yes" if row.runs_on(chip) else "no" for chip in chips.CHIPS.values()]
        own = ", ".join(f"`{rule}`" for rule in sorted(row.rules - common))
        lines.append(f"| `nki.{row.module}.{row.name}` | {' | '.join(on)} | {own} |")
    absent = ", ".join(f"`nki.isa.{name}`" for name in sorted(isa.MISSING))
    called = ", ".join(f"`{name}`" for name in language_names())
    lines += ["", f"Not simulated; they raise and name themselves: {absent}."]
    return "\n".join([*lines, "", f"Functions of `nki.language`: {called}.", ""])


def with_tables(page: str) -> str:
    """`page` with its generated part made anew; ValueError when it has no place for it."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"expected {_BEGIN} and {_END} in the page, got neither or one")
    return f"{before}{_BEGIN}\n\n{tables()}\n{_END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
