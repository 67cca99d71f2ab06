"""Which names of nki a folder of kernels uses, and which of them the simulator lacks.

    python -m nxd_cp.simulators.nki_api.used_names PATH_TO_CLONE [PATH...]

Reads files that `import nki`, follows `import ... as` and `from ... import`, and looks every
attribute up in the simulator's modules. Imports and runs nothing; values that are passed on under
another name are not followed. Exits with 1 when fewer than 95 % of the files are covered.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import dtypes, isa
from .surface import nki_modules

GOAL = 0.95
# Names that exist to say that they are missing; and what the goal leaves out.
LEFT_OUT = frozenset(
    [f"nki.language.{name}" for name in dtypes.PACKED]
    + [f"nki.isa.{name}" for name in ("nc_matmul_mx", "quantize_mx", "topk")]
)


@dataclass(frozen=True)
class FileNames:
    """One file: the dotted names of nki that it uses, and those that the simulator lacks."""

    path: Path
    used: frozenset[str]
    missing: frozenset[str]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name of nki."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nki":
                    found[alias.asname or "nki"] = alias.name if alias.asname else "nki"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nki":
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def names_used(source: str) -> frozenset[str]:
    """Dotted names of nki in a file's source; raises SyntaxError where it is no Python."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    found = {name for name in aliases.values() if name != "nki"}
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in aliases:
            found.add(".".join([aliases[inner.id], *reversed(parts)]))
    return frozenset(found)


def is_there(name: str) -> bool:
    """Whether the simulator has a dotted name of nki (a member of an enumeration included)."""
    modules = nki_modules()
    parts = name.split(".")
    depth = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules)
    value: object = modules[".".join(parts[:depth])]
    for part in parts[depth:]:
        if value is modules["nki.isa"] and part in isa.MISSING:
            return False
        if isinstance(value, dtypes.DType):
            return True  # attributes of a dtype are a string's
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return not (isinstance(value, dtypes.DType) and value in dtypes.PACKED)


def _public(name: str) -> str:
    """The part of a dotted name that an API page names: nki.<module>.<name>."""
    return ".".join(name.split(".")[:3])


def scan(paths: Iterable[Path]) -> list[FileNames]:
    """Every Python file below `paths` that imports nki; files that do not parse are left out."""
    found = []
    for root in paths:
        for path in sorted(root.rglob("*.py")):
            try:
                used = names_used(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            if used:
                missing = frozenset(_public(n) for n in used if not is_there(n))
                found.append(FileNames(path, used, missing))
    return found


def covered(files: Sequence[FileNames]) -> float:
    """Share of files without a missing name, those in LEFT_OUT aside."""
    return sum(not f.missing - LEFT_OUT for f in files) / len(files) if files else 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the share of files covered and every missing name with its number of files."""
    parser = argparse.ArgumentParser(
        description="Names of nki that kernels use and the simulator lacks."
    )
    parser.add_argument("path", nargs="+", type=Path)
    files = scan(parser.parse_args(arguments).path)
    counts = Counter(name for file in files for name in file.missing)
    whole = sum(not file.missing for file in files)
    print(f"{len(files)} files import nki; {whole} use only names that the simulator has;")
    print(
        f"{covered(files):.1%} with packed types, MX instructions and topk aside (goal {GOAL:.0%})."
    )
    for name, count in counts.most_common():
        example = next(str(f.path) for f in files if name in f.missing)
        aside = " (left out)" if name in LEFT_OUT else ""
        print(f"{count:5d}  {name}{aside}  {example}")
    return 0 if files and covered(files) >= GOAL else 1


__all__ = ["FileNames", "covered", "is_there", "main", "names_used", "scan"]

if __name__ == "__main__":
    raise SystemExit(main())
