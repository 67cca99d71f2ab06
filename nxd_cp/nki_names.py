"""What names in a kernel's file stand for, however its modules were imported.

Does: read a file's imports, and write an expression with the names `nki`, `nl` (nki.language),
`nisa` (nki.isa) and `ncc` (nki.collectives). Does not: follow values; a function that is first
given another name by assignment is not known.
"""

from __future__ import annotations

import ast

MODULES = {"nki.language": "nl", "nki.isa": "nisa", "nki.collectives": "ncc"}


class Names:
    """The imported names of one file; the usual ones where nothing is imported under them."""

    def __init__(self, tree: ast.Module) -> None:
        self._full: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        self._full[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    self._full[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def of(self, expression: ast.expr) -> str:
        """`nki.isa.memset`, `isa.memset` or an imported `memset` as "nisa.memset"."""
        first, dot, rest = ast.unparse(expression).partition(".")
        return short(self._full.get(first, first) + dot + rest)


def short(full: str) -> str:
    """A dotted name with the usual names of NKI's modules."""
    for module, usual in MODULES.items():
        if full == module or full.startswith(f"{module}."):
            return usual + full.removeprefix(module)
    return full
