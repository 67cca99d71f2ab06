"""What NKI rejects and no single place of a source shows: what becomes of a register or a function.

Does: find numbers that exist on the device alone where Python would need them (in a condition, as a
number, in arithmetic), bodies of device loops that return a value, and kernels that call kernels.
Does not: look into other files, or follow a value through calls.

Sources: NKI migration guide ("Rules for migrated loops", "Remove nki.jit decorator on
sub-kernels"), NKI language guide (registers).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nxd_cp.nki_names import Names

BODY = 2  # the argument of nl.fori_loop that is its body
NUMBERS = ("int", "float", "bool", "range", "min", "max")


def flow(tree: ast.Module, names: Names) -> Iterator[tuple[int, str]]:
    """(line, sentence) of each finding."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    yield from _sub_kernels(tree, names, functions)
    yield from _registers(tree, _register_names(tree, names))
    for call in _calls(tree):
        if names.of(call.func) == "nl.fori_loop" and len(call.args) > BODY:
            body = functions.get(ast.unparse(call.args[BODY]))
            if body is not None:
                yield from _body(body)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _sub_kernels(
    tree: ast.Module, names: Names, functions: dict[str, ast.FunctionDef]
) -> Iterator[tuple[int, str]]:
    kernels = {name for name, node in functions.items() if _is_kernel(node, names)}
    for function in functions.values():
        for call in _calls(ast.Module(body=function.body, type_ignores=[])):
            if ast.unparse(call.func) in kernels:
                text = "a kernel that a kernel calls must not be decorated (nki.jit)"
                yield call.lineno, f"{ast.unparse(call.func)}: {text}; since 0.2"


def _is_kernel(function: ast.FunctionDef, names: Names) -> bool:
    decorators = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(names.of(decorator) == "nki.jit" for decorator in decorators)


def _register_names(tree: ast.Module, names: Names) -> set[str]:
    """Names that were given a register, alone or several at a time."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(value, ast.Call) and names.of(value.func) in _MAKES_REGISTERS:
                        found.add(ast.unparse(name))
    return found


_MAKES_REGISTERS = (
    "nisa.register_alloc",
    "ncc.collective_permute_implicit_current_processing_rank_id",
    "ncc.rank_id",
)


def _registers(tree: ast.AST, registers: set[str]) -> Iterator[tuple[int, str]]:
    """Places where Python would have to know a number that exists on the device alone."""

    def is_one(node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in registers

    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.If | ast.IfExp | ast.Assert):
            parts = [node.test]
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.AugAssign):
            parts = [node.target, node.value]
        elif isinstance(node, ast.UnaryOp):
            parts = [node.operand]
        elif isinstance(node, ast.BoolOp):
            parts = node.values
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in NUMBERS:
            parts = node.args
        elif isinstance(node, ast.Subscript):
            parts = _indices(node.slice)
        for part in filter(is_one, parts):
            text = (
                "a number on the device has no value for Python; only addresses and loops take it"
            )
            yield part.lineno, f"{ast.unparse(part)}: {text}"


def _indices(index: ast.expr) -> list[ast.expr]:
    """The parts of `x[a, b:c]`."""
    found: list[ast.expr] = []
    for part in index.elts if isinstance(index, ast.Tuple) else [index]:
        if isinstance(part, ast.Slice):
            found += [end for end in (part.lower, part.upper, part.step) if end is not None]
        else:
            found.append(part)
    return found


def _body(body: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    """The body of nl.fori_loop: its variable, and what it returns."""
    yield from _registers(body, {argument.arg for argument in body.args.args})
    for node in ast.walk(body):
        if isinstance(node, ast.Return) and node.value is not None:
            text = "a body of nl.fori_loop returns nothing; keep what lasts in SBUF or HBM"
            yield node.lineno, f"{body.name}: {text}"
