"""Import a published file that is no valid Python because a piece of a docstring is there twice.

nki-library@d2ad3a5 has such a file (core/mlp/mlp.py: the end of a docstring follows the closing
quotes once more). The second copy is left out in memory, line numbers stay, the clone is not
touched, and every repair is listed. Anything else that does not parse stays an error.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import linecache
import sys
from collections.abc import Sequence
from typing import Any

REPAIRS: list[str] = []


def without_repeated_docstring_end(source: str) -> tuple[str, int, int] | None:
    """(source with blank lines for the second copy, its first and last line), or None."""
    lines = source.split("\n")
    quotes = [i for i, line in enumerate(lines) if line.strip() == '"""']
    for first, second in itertools.pairwise(quotes):
        copy = [line for line in lines[first + 1 : second] if line.strip()]
        before = [line for line in lines[:first] if line.strip()]
        if copy and before[-len(copy) :] == copy:
            kept = [*lines[: first + 1], *[""] * (second - first), *lines[second + 1 :]]
            return "\n".join(kept), first + 2, second + 1
    return None


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any) -> Any:  # type: ignore[override]
        try:
            return super().source_to_code(data, path)
        except SyntaxError:
            repaired = without_repeated_docstring_end(bytes(data).decode("utf-8"))
            if repaired is None:
                raise
            code = super().source_to_code(repaired[0].encode("utf-8"), path)
            lines = repaired[0].splitlines(keepends=True)  # what tools that read sources shall see
            linecache.cache[str(path)] = (len(repaired[0]), None, lines, str(path))
            REPAIRS.append(f"{path}: lines {repaired[1]}-{repaired[2]} repeat a docstring's end")
            return code


class RepairFinder(importlib.abc.MetaPathFinder):
    """Finds modules of one package as usual, but loads them with the repair above."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec with our loader, for modules of the package alone."""
        if not (fullname == self.package or fullname.startswith(self.package + ".")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Repair files of `package` in this process."""
    sys.meta_path.insert(0, RepairFinder(package))
