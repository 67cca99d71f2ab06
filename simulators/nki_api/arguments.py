"""One clear error for an argument that a function of the language cannot make sense of at all.

Rules check what arguments may be; anything else (None for a tile, a string for a size) ends here
instead of as an AttributeError somewhere inside. A call that does not fit the signature keeps its
TypeError, which says so.

Source: the nki.isa and nki.language page of each function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .errors import NkiValidationError, fail, outside
from .rules import documented

_ARGUMENTS = documented(
    "instruction.arguments",
    "nki.isa, nki.language, nki.collectives (parameters of each function)",
    "every argument is of the kind that its parameter takes",
)
SYMPTOMS = (
    AttributeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AssertionError,
    ArithmeticError,
)
Function = TypeVar("Function", bound=Callable[..., Any])


def guarded(prefix: str, function: Function) -> Function:
    """`function`, whose confusion about an argument is reported as a broken rule."""
    name = f"{prefix}.{function.__name__}"

    @functools.wraps(function)
    def instruction(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SYMPTOMS as error:
            explain(error, name, args, kwargs)

    return instruction  # type: ignore[return-value]


def explain(error: Exception, name: str, args: Any, kwargs: dict[str, Any]) -> NoReturn:
    """Raise the broken rule for one of SYMPTOMS that a call of `name` gave, or the error itself."""
    if isinstance(error, NkiValidationError) or not _inside(error):
        raise error
    given = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    detail = f"{type(error).__name__}: {error}".partition("\n")[0]
    try:
        fail(_ARGUMENTS, name, detail, **given)
    except NkiValidationError as clear:
        raise clear from error


def _inside(error: Exception) -> bool:
    """Whether an exception comes from within an instruction, not from a call that it refuses."""
    below = error.__traceback__
    frames = 0
    while below is not None:
        if outside(below.tb_frame) and _is_kernel(below.tb_frame.f_globals.get("__name__", "")):
            return False
        frames += 1
        below = below.tb_next
    return frames > 1


def _is_kernel(module: str) -> bool:
    """NumPy and the standard library are ours; a callback of the kernel is not."""
    return module.partition(".")[0] not in ("numpy", "ml_dtypes", "functools", "enum")
