"""Does a kernel's source stay within what NKI 0.2 to 0.6 all accept?

Does: parse files and name every construct, instruction, parameter and language name that at least
one of those versions rejects. A file that says `NKI_SINCE = "0.6"` is for that version and later,
and may use what had been added by then. Does not: run anything, follow values, or check shapes and
dtypes; the simulator does that. A file without findings can still be rejected by a compiler.

Sources: the NKI migration guide ("Language restrictions", "Migrating from NKI 0.1.0"), the NKI
release notes of 0.3.0, the NKI language guide ("NKI Values", "Class support"), and the API stubs
(`nki_common.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nxd_cp.nki_common import ADDED, ISA, LANGUAGE, NDARRAY
from nxd_cp.nki_constructs import constructs

REMOVED_PARAMETERS = ("mask", "platform_target", "mode")


@dataclass(frozen=True)
class Finding:
    """One construct that some version rejects."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def check_folder(folder: Path) -> list[Finding]:
    """Findings of every Python file below `folder`, by path and line."""
    return [
        f for path in sorted(folder.rglob("*.py")) for f in check_source(path.read_text(), path)
    ]


def check_source(source: str, path: Path | str = "<kernel>") -> list[Finding]:
    """Findings of one file; raises SyntaxError where it is no Python."""
    found = {(line, text) for line, text in _visit(ast.parse(source))}
    return [Finding(str(path), line, text) for line, text in sorted(found)]


def first_version(tree: ast.Module) -> str:
    """What the file says as `NKI_SINCE`; "0.2" where it says nothing."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NKI_SINCE":
            return str(ast.literal_eval(node.value))
    return "0.2"


def _visit(tree: ast.Module) -> Iterator[tuple[int, str]]:
    since = first_version(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for text in _findings(node, since):
            yield line, text


def _findings(node: ast.AST, since: str) -> Iterator[str]:
    yield from (text for _, text in constructs(node))
    if isinstance(node, ast.ClassDef):
        if [ast.unparse(base) for base in node.bases] not in (["NKIObject"], ["nl.NKIObject"]):
            yield f"class {node.name} must inherit from nl.NKIObject alone"
    elif isinstance(node, ast.ImportFrom | ast.Import):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names or [alias.name for alias in node.names]:
            if name.split(".")[0] == "neuronxcc":
                yield "neuronxcc.nki was removed in 0.4; import nki"
            yield from _too_new(name, since)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Attribute):
        yield from _language_name(node, since)


def _too_new(name: str, since: str) -> Iterator[str]:
    """Names that came later than the first version that the file is for."""
    if ADDED.get(name, since) > since:
        yield f'{name} came with NKI {ADDED[name]}; say NKI_SINCE = "{ADDED[name]}" in the file'


def _language_name(node: ast.Attribute, since: str) -> Iterator[str]:
    if not (isinstance(node.value, ast.Name) and node.value.id == "nl"):
        return
    name = f"nl.{node.attr}"
    if name in ADDED:
        yield from _too_new(name, since)
    elif node.attr not in LANGUAGE:
        yield f"{name} is not in every version from 0.2 to 0.6"
    elif node.attr == "hbm":
        yield "nl.hbm for outputs is rejected since 0.3; write nl.shared_hbm"


def _call(node: ast.Call) -> Iterator[str]:
    """Instructions and nl.ndarray: known, by keyword, with parameters that all versions have."""
    called = ast.unparse(node.func)
    module, _, name = called.rpartition(".")
    keywords = [keyword.arg or "**" for keyword in node.keywords]
    for removed in REMOVED_PARAMETERS:
        if removed in keywords and module in ("nl", "nisa", "nki"):
            yield f"{called}: parameter {removed} was removed"
    if called == "nl.ndarray":
        yield from _unknown(called, keywords, NDARRAY)
        for keyword in node.keywords:
            if keyword.arg == "buffer" and isinstance(keyword.value, ast.Constant):
                yield "nl.ndarray: a buffer named by a string is rejected since 0.3; pass nl.sbuf"
    if module != "nisa" or name in ("get_nc_version",):
        return
    if name not in ISA:
        yield f"nisa.{name} is not in every version from 0.2 to 0.6"
        return
    if node.args:
        yield f"{called}: pass operands by keyword; their order is not the same in all versions"
    yield from _unknown(called, keywords, ISA[name])


def _unknown(called: str, keywords: list[str], known: tuple[str, ...]) -> Iterator[str]:
    for keyword in keywords:
        if keyword not in known and keyword not in REMOVED_PARAMETERS:
            yield f"{called}: parameter {keyword} is not in every version from 0.2 to 0.6"
