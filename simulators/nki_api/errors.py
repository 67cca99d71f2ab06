"""What goes wrong in a kernel, said once and well.

A message has the instruction, the rule with its source, every operand with shape, dtype and
place, and the user's own line: the first frame outside the simulator. The stack is walked only
here, when something is already wrong. Does not decide whether something is wrong.
"""

from __future__ import annotations

import inspect
import linecache
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn

from .rules import DOCUMENTED, Rule

STRICT: ContextVar[bool] = ContextVar("nki_simulator_strict", default=False)
TOLERATED: ContextVar[frozenset[str]] = ContextVar("nki_tolerated_rules", default=frozenset())
PLACE: ContextVar[str] = ContextVar("nki_simulator_place", default="")  # when there are several
MOST_DECORATORS = 50  # lines of them before a `def`
_PACKAGE = __name__.rpartition(".")[0]
_BLAMED: ContextVar[tuple[tuple[str, int], dict[Any, Any]] | None] = ContextVar(
    "nki_simulator_blamed", default=None
)


@contextmanager
def strictness(strict: bool, tolerated: frozenset[str] = frozenset()) -> Iterator[None]:
    """Whether inferred rules raise in this block, and the ids of rules that only warn."""
    tokens = STRICT.set(strict), TOLERATED.set(tolerated)
    try:
        yield
    finally:
        STRICT.reset(tokens[0])
        TOLERATED.reset(tokens[1])


@contextmanager
def blamed(place: tuple[str, int], function: Any = None) -> Iterator[None]:
    """Rules broken in this block are about (file, line), not about where the caller is now.

    For what is found out when the kernel `function` has ended, or before it starts; by default
    the one of the block around this one.
    """
    around = _BLAMED.get()
    registry = {} if around is None else around[1]
    if function is not None:
        spaces = getattr(inspect.unwrap(function), "__globals__", {})
        registry = spaces.setdefault("__warningregistry__", {})
    token = _BLAMED.set((place, registry))
    try:
        yield
    finally:
        _BLAMED.reset(token)


@contextmanager
def placed(label: str) -> Iterator[None]:
    """Messages of this block say which rank and core they are about."""
    token = PLACE.set(label)
    try:
        yield
    finally:
        PLACE.reset(token)


def definition(function: Any) -> tuple[str, int]:
    """File and line of a function's `def`."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "", 0
    file, first = code.co_filename, code.co_firstlineno
    near = range(first, first + MOST_DECORATORS)
    found = (n for n in near if linecache.getline(file, n).lstrip().startswith("def "))
    return file, next(found, first)


class NkiValidationError(ValueError):
    """A kernel broke a rule of the language or the hardware."""


class NkiUnsupportedError(NkiValidationError, NotImplementedError):
    """The simulator does not implement this; it never guesses."""


class NkiDeadlockError(NkiValidationError):
    """Ranks or cores wait for each other, or for one that has ended."""


class NkiSimulatorWarning(UserWarning):
    """A rule of the inferred tier was broken."""


def outside(frame: FrameType) -> bool:
    """Whether a frame is not the simulator's."""
    return not frame.f_globals.get("__name__", "").startswith(_PACKAGE)


def user_frame() -> FrameType | None:
    """The innermost frame outside the simulator, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not outside(frame):
        frame = frame.f_back
    return frame


def user_place() -> tuple[str, int]:
    """File and line of the user's frame, or what is blamed."""
    blame = _BLAMED.get()
    if blame is not None:
        return blame[0]
    frame = user_frame()
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def line_text(name: str, line: int) -> str:
    """`file:line: source text`."""
    return f"{name}:{line}: {linecache.getline(name, line).strip()}" if name else "<no user frame>"


def user_line() -> str:
    """`file:line: source text` of the user's frame; before it rank and core, if several."""
    return PLACE.get() + line_text(*user_place())


def _operand(name: str, value: Any) -> str:
    described = value.describe() if hasattr(value, "describe") else repr(value)
    return f"    {name:<12} {described}"


def message(rule: Rule, instruction: str, detail: str, operands: dict[str, Any]) -> str:
    """The full text of a broken rule; its last line is the user's."""
    lines = [
        f"{instruction}: {detail}",
        f"  rule {rule.id} ({rule.tier}; {rule.source}): {rule.text}",
    ]
    lines += [_operand(name, value) for name, value in operands.items()]
    lines.append(f"  at {user_line()}")
    return "\n".join(lines)


def broken(rule: Rule, instruction: str, detail: str, **operands: Any) -> None:
    """Raise NkiValidationError for a documented rule, warn for an inferred or tolerated one."""
    text = message(rule, instruction, detail, operands)
    raises = rule.tier == DOCUMENTED or STRICT.get()
    if raises and rule.id not in TOLERATED.get():
        raise NkiValidationError(text)
    frame, blame = user_frame(), _BLAMED.get()
    if blame is not None:
        registry = blame[1]
    else:
        registry = {} if frame is None else frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, NkiSimulatorWarning, *user_place(), registry=registry)


def deprecated(text: str) -> None:
    """A DeprecationWarning at the user's line: what works, and later versions of NKI drop."""
    frame = user_frame()
    registry = {} if frame is None else frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, DeprecationWarning, *user_place(), registry=registry)


def fail(rule: Rule, instruction: str, detail: str, **operands: Any) -> NoReturn:
    """Raise whatever the tier: for breaches after which nothing sensible can be computed."""
    raise NkiValidationError(message(rule, instruction, detail, operands))


def unsupported(what: str, hint: str = "") -> NoReturn:
    """Raise NkiUnsupportedError that names `what`."""
    tail = f"; {hint}" if hint else ""
    raise NkiUnsupportedError(f"the simulator does not implement {what}{tail}\n  at {user_line()}")
