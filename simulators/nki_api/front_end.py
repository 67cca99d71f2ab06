"""What a compiler would say about a kernel's Python before anything runs.

The simulator runs any Python; the compilers of NKI 0.3 to 0.6 take a subset. Each kernel function
is read once, and a construct outside the subset is a warning at its own line (strict: an error):
AWS's own kernels use `is`, so the documents disagree. Does not read functions that it calls.

Source: nxd_cp/nki_refused_python.py; NKI migration guide; NKI language guide.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

from nxd_cp.nki_refused_python import refused_python

from .errors import blamed, broken, definition, strictness, user_frame
from .rules import inferred

_GUIDE = "NKI migration guide, Language restrictions; nki-library@d2ad3a5 uses it"
_RULES = {
    "is": inferred("front_end.is", _GUIDE, "kernels compare with == and !=, not with `is`"),
    "signature": inferred(
        "front_end.signature",
        "NKI migration guide, Language restrictions",
        "a kernel's signature has plain parameters only, without list defaults",
    ),
    "dict_keys": inferred(
        "front_end.dict_keys", "NKI language guide, NKI Values", "keys of dicts are strings"
    ),
    "python": inferred(
        "front_end.python",
        "NKI language guide; NKI 0.7 takes more",
        "a kernel stays in NKI's subset of Python",
    ),
}
_IF = inferred(
    "front_end.if_register",
    "NKI language guide, Control Flow and Dynamic Control Flow",
    "an `if` is resolved when the kernel is built; a register is a condition of `while` alone",
)
_LIST = inferred(
    "front_end.list_argument",
    "NKI migration guide, Language restrictions",
    "kernel arguments are tuples, not lists",
)
_NESTED = inferred(
    "front_end.nested_kernel",
    "NKI migration guide, Remove nki.jit decorator on sub-kernels; nki-library@d2ad3a5 has them",
    "a kernel that another kernel calls is a plain function",
)

# CPython 3.11 checks one count of a tree's depth for all threads: where two parse at once and the
# garbage collector lets them change places, ast.parse raises SystemError (python/cpython#106905).
_ONE_PARSER = threading.Lock()


def _source(code: CodeType) -> tuple[ast.Module, int]:
    """A function's syntax tree and first line; an empty tree where its source cannot be read."""
    try:
        lines, first = inspect.getsourcelines(code)
        with _ONE_PARSER:
            return ast.parse(textwrap.dedent("".join(lines))), first
    except (OSError, TypeError, SyntaxError):
        return ast.Module(body=[], type_ignores=[]), 0


@functools.lru_cache(maxsize=4096)
def _findings(code: CodeType) -> tuple[tuple[str, str, int], ...]:
    """(kind, sentence, line) in the source of a function; nothing where it cannot be read."""
    tree, first = _source(code)
    function = tree.body[0] if tree.body else None
    if not isinstance(function, ast.FunctionDef):
        return ()  # a lambda or an expression: the statement around it is not the kernel
    found = [(*item, function.lineno) for item in refused_python(function)]
    for statement in function.body:
        for node in ast.walk(statement):
            found += [(*item, getattr(node, "lineno", 1)) for item in refused_python(node)]
    return tuple((kind, text, first + line - 1) for kind, text, line in found)


def check_kernel(function: Callable[..., Any], args: Any, kwargs: Any, strict: bool) -> None:
    """Warn of (strict: reject) what a compiler rejects in this function or call."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    name = f"nki.jit {function.__name__}"
    found: dict[str, list[tuple[str, int]]] = {}
    for kind, text, line in _findings(code):
        found.setdefault(kind, []).append((text, line))
    for kind, places in found.items():
        text, line = places[0]
        more = f" (and {len(places) - 1} more in this function)" if len(places) > 1 else ""
        with blamed((code.co_filename, line), function), strictness(strict):
            broken(_RULES[kind], name, text + more)
    if any(isinstance(value, list) for value in (*args, *kwargs.values())):
        with blamed(definition(function), function), strictness(strict):
            broken(_LIST, name, "a list as an argument")


@functools.lru_cache(maxsize=4096)
def _while_lines(code: CodeType) -> frozenset[int] | None:
    """Lines of the conditions of `while` in a function; None where its source cannot be read."""
    tree, first = _source(code)
    if not tree.body:
        return None
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.While)]
    spans = [range(test.lineno, (test.end_lineno or test.lineno) + 1) for test in tests]
    return frozenset(first + line - 1 for span in spans for line in span)


def check_condition(instr: str) -> None:
    """Report a register that decides an `if`, `not`, `and`, `or` or assert of the user's line."""
    frame = user_frame()
    if frame is None:
        return
    allowed = _while_lines(frame.f_code)
    if allowed is not None and frame.f_lineno not in allowed:
        broken(_IF, instr, "its value is known on the device only; select by data or loop over it")


def check_nested(function: Callable[..., Any], strict: bool) -> None:
    """Warn of a decorated kernel that is called inside another kernel."""
    if getattr(function, "__code__", None) is not None:
        with blamed(definition(function), function), strictness(strict):
            broken(_NESTED, f"nki.jit {function.__name__}", "called by a kernel")
