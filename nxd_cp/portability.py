"""Does a kernel's source stay within what NKI 0.2 to 0.6 all accept?

Does: parse files and name every construct, instruction, parameter and language name that at least
one of those versions rejects, under whatever names a file imports NKI (`nki_names.py`). A file that
says `NKI_SINCE = "0.6"` is for that version and later, and may use what had been added by then.
Does not: run anything, or check shapes and dtypes; the simulator does that. A file without findings
can still be rejected by a compiler.

Sources: the NKI migration guide ("Language restrictions", "Integer enum constants", "Parameter
default value updates", "Migrating from NKI 0.1.0"), the NKI release notes of 0.3.0, the NKI
language guide ("NKI Values", "Class support"), and the API stubs (`nki_signatures.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from nxd_cp.nki_flow import flow
from nxd_cp.nki_names import Names, short
from nxd_cp.nki_refused_python import refused_python
from nxd_cp.nki_signatures import (
    ADDED,
    COLLECTIVE_CLASSES,
    COLLECTIVES,
    ENUMS,
    FIRST_ARGUMENTS,
    ISA,
    LANGUAGE,
    NDARRAY,
    NEEDED,
)

REMOVED_PARAMETERS = ("mask", "platform_target", "mode")
CLASSES = (["NKIObject"], ["nl.NKIObject"], ["Enum"], ["enum.Enum"])
LARGEST_INTEGER = 2**31 - 1
KNOWN: dict[str, Set[str]] = {
    "nl": LANGUAGE,
    "nisa": {*ISA, *ENUMS},
    "ncc": {*COLLECTIVES, *COLLECTIVE_CLASSES},
}


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
    """Findings of one file; that it is no Python is one too."""
    try:
        found = {(line, text) for line, text in _visit(ast.parse(source))}
    except SyntaxError as error:
        found = {(error.lineno or 0, f"no Python: {error.msg}")}
    return [Finding(str(path), line, text) for line, text in sorted(found)]


def first_version(tree: ast.Module) -> str:
    """What the file says as `NKI_SINCE`; "0.2" where it says nothing."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NKI_SINCE":
            return str(ast.literal_eval(node.value))
    return "0.2"


def _visit(tree: ast.Module) -> Iterator[tuple[int, str]]:
    since, names = first_version(tree), Names(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for text in _findings(node, since, names):
            yield line, text
    yield from flow(tree, names)


def _findings(node: ast.AST, since: str, names: Names) -> Iterator[str]:
    yield from (text for _, text in refused_python(node))
    if isinstance(node, ast.ClassDef):
        if [names.of(base) for base in node.bases] not in CLASSES:
            yield f"class {node.name} must inherit from nl.NKIObject alone, or be an Enum"
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from _import(node, since)
    elif isinstance(node, ast.Call):
        yield from _call(node, names)
    elif isinstance(node, ast.Attribute):
        yield from _name(names.of(node), since)
    elif isinstance(node, ast.Set | ast.SetComp):
        yield "sets: NKI has tuples, lists, and dicts with strings as keys"
    elif isinstance(node, ast.Constant):
        yield from _constant(node.value)


def _import(node: ast.ImportFrom | ast.Import, since: str) -> Iterator[str]:
    """Modules that are gone or came later, and names imported out of NKI's modules."""
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    for name in [module] if module else [alias.name for alias in node.names]:
        if name.split(".")[0] == "neuronxcc":
            yield "neuronxcc.nki was removed in 0.4; import nki"
        yield from _too_new(name, since)
    if module.split(".")[0] == "nki":
        for alias in node.names:
            yield from _name(short(f"{module}.{alias.name}"), since)


def _constant(value: object) -> Iterator[str]:
    if isinstance(value, bytes | complex):
        yield f"{value!r}: NKI has no such values (None, bool, 32-bit int and float, string)"
    elif isinstance(value, int) and value > LARGEST_INTEGER:
        yield f"{value}: integers have 32 bits"


def _too_new(name: str, since: str) -> Iterator[str]:
    """Names that came later than the first version that the file is for."""
    if ADDED.get(name, since) > since:
        yield f'{name} came with NKI {ADDED[name]}; say NKI_SINCE = "{ADDED[name]}" in the file'


def _name(name: str, since: str) -> Iterator[str]:
    """`nl.x`, `nisa.x` or `ncc.x`: in every version, or added by the file's first one."""
    module, _, attribute = name.partition(".")
    if not attribute or "." in attribute:
        return
    if name in ADDED:
        yield from _too_new(name, since)
    elif module in KNOWN and attribute not in KNOWN[module]:
        yield f"{name} is not in every version from {_first(module)} to 0.6"
    elif name == "nl.hbm":
        yield "nl.hbm for outputs is rejected since 0.3; write nl.shared_hbm"


def _call(node: ast.Call, names: Names) -> Iterator[str]:
    """Instructions and what makes tensors: by keyword, with parameters that all versions have."""
    called = names.of(node.func)
    module, _, name = called.rpartition(".")
    keywords = {keyword.arg or "**": keyword.value for keyword in node.keywords}
    for removed in REMOVED_PARAMETERS:
        if removed in keywords and module in ("nl", "nisa", "nki"):
            yield f"{called}: parameter {removed} was removed"
    if len(node.args) < FIRST_ARGUMENTS.get(called, 0) and not keywords:
        yield f"{called}: its arguments have defaults since 0.3 only; give them"
    if called in ("nl.ndarray", "nl.zeros"):
        given = dict(zip(NDARRAY, node.args, strict=False)) | keywords
        yield from _unknown(called, keywords, NDARRAY)
        yield from _missing(called, given)
        if isinstance(given.get("buffer"), ast.Constant):
            yield f"{called}: a buffer named by a string is rejected since 0.3; pass nl.sbuf"
    elif called == "nisa.get_nc_version":
        return
    elif module == "nisa" and name in ISA:
        if node.args:
            yield f"{called}: pass operands by keyword; their order is not the same in all versions"
        else:
            yield from _missing(called, keywords)
            if "dst" in ISA[name] and "dst" not in keywords:
                yield f"{called}: nothing is returned since 0.2; pass dst"
        yield from _unknown(called, keywords, ISA[name])
        yield from _numbered_enums(called, keywords)
    elif module == "ncc" and name in COLLECTIVES:
        yield from _unknown(called, keywords, COLLECTIVES[name])


def _missing(called: str, given: dict[str, ast.expr]) -> Iterator[str]:
    for name in NEEDED.get(called, ()):
        if name not in given:
            yield f"{called}: parameter {name} has a default since 0.3 only; give it"


def _numbered_enums(called: str, keywords: dict[str, ast.expr]) -> Iterator[str]:
    for name, value in keywords.items():
        if name in ENUMS and isinstance(value, ast.Constant) and isinstance(value.value, int):
            text = "a raw integer for an enum is rejected since 0.3"
            yield f"{called}: {name}={value.value}: {text}; write nisa.{name} and its member"


def _unknown(called: str, keywords: dict[str, ast.expr], known: tuple[str, ...]) -> Iterator[str]:
    versions = f"from {_first(called.partition('.')[0])} to 0.6"
    for keyword in keywords:
        if keyword not in known and keyword not in REMOVED_PARAMETERS:
            yield f"{called}: parameter {keyword} is not in every version {versions}"


def _first(module: str) -> str:
    """The first version whose stubs of this module were read."""
    return "0.3" if module == "ncc" else "0.2"
