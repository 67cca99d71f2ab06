"""Constructs of Python that the compilers of NKI 0.3 to 0.6 do not take inside a kernel.

Pure data and syntax trees: no names of instructions (nki_signatures.py), no values, no shapes. Read
by the portability checker, which rejects them, and by the simulator, which warns: AWS's own kernels
use some of them, and NKI 0.7 runs real Python.

Sources: NKI migration guide ("Language restrictions"), NKI language guide ("NKI Values").
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

PYTHON = {
    ast.Lambda: "lambda",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Await: "await",
    ast.AsyncFunctionDef: "async functions",
    ast.Try: "try",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.While: "while (a device loop in 0.2 to 0.5, deprecated in 0.6)",
    ast.GeneratorExp: "generator expressions",
    ast.Starred: "argument unpacking",
}


def refused_python(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, sentence) for each construct that this one node is; kinds: python, is, signature,
    dict_keys."""
    if type(node) in PYTHON:
        yield "python", f"{PYTHON[type(node)]}: not in NKI's subset of Python"
    elif isinstance(node, ast.Compare):
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            yield "is", "`is` and `is not` are rejected since 0.3; write == or !="
    elif isinstance(node, ast.FunctionDef):
        yield from _signature(node)
    elif isinstance(node, ast.Dict) and any(not _is_text(key) for key in node.keys):
        yield "dict_keys", "dict keys must be strings"


def _is_text(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and isinstance(key.value, str)


def _signature(node: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    arguments = node.args
    if arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.posonlyargs:
        text = "`*`, `/`, *args and **kwargs in a signature are rejected since 0.3"
        yield "signature", f"{node.name}: {text}"
    if any(isinstance(default, ast.List) for default in arguments.defaults):
        yield "signature", f"{node.name}: list arguments are rejected since 0.3; use a tuple"
