"""Imports go one way: no circles in `nxd_cp`, in functions neither; the core knows no integration.

The simulators' language has circles of its own inside functions; of those only the load counts,
which would fail. Imports for type checkers alone are free.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who may know the integrations: what stands above the package.
ABOVE = ("nxd_cp.integrations", "nxd_cp.doctor")


def _modules() -> dict[str, ast.Module]:
    """Of `nxd_cp` without the two linked folders."""
    paths = sorted((ROOT / "nxd_cp").glob("*.py"))
    for folder in sorted((ROOT / "nxd_cp").iterdir()):
        if folder.is_dir() and not folder.is_symlink():
            paths += sorted(folder.rglob("*.py"))
    trees = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def _imported(tree: ast.AST, names: set[str]) -> set[str]:
    """Those of `names` that are imported, wherever the import stands."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "nxd_cp has no relative imports"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & names
            if below - names:  # something of the module itself
                found.add(str(node.module))
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            found |= _imported(node, names)
    return found & names


def _graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Who imports whom."""
    return {name: _imported(tree, set(trees)) for name, tree in trees.items()}


def _circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _knows_integrations(graph: dict[str, set[str]]) -> list[str]:
    return [
        name
        for name, imported in graph.items()
        if not name.startswith(ABOVE)
        and any(other.startswith("nxd_cp.integrations") for other in imported)
    ]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = _graph(_modules())
    assert "nxd_cp.transport" in graph["nxd_cp.context"]
    assert _circle(graph) == []


def test_the_core_knows_no_integration() -> None:
    assert _knows_integrations(_graph(_modules())) == []


@pytest.mark.parametrize("where", ["", "def find():\n    "])
def test_a_circle_and_an_integration_in_the_core_are_caught(where: str) -> None:
    trees = _modules()
    trees["nxd_cp.loss"] = ast.parse(
        f"{where}from nxd_cp.integrations.nxd.loss import token_mean_loss"
    )
    graph = _graph(trees)
    assert set(_circle(graph)) == {"nxd_cp.loss", "nxd_cp.integrations.nxd.loss"}
    assert _knows_integrations(graph) == ["nxd_cp.loss"]


def test_an_import_for_type_checkers_is_free() -> None:
    trees = _modules()
    trees["nxd_cp.loss"] = ast.parse(
        "if TYPE_CHECKING:\n    from nxd_cp.integrations.nxd.loss import token_mean_loss"
    )
    assert _circle(_graph(trees)) == []
