"""Imports go one way: no circles in `nxd_cp`, in functions neither; the core knows no integration,
and what lies below asks for plain data alone.

The simulators' language has circles of its own inside functions, and relative imports; of those
only the load counts, which would fail. Imports for type checkers alone are free.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who may know the integrations: what stands above the package.
ABOVE = ("nxd_cp.integrations", "nxd_cp.doctor")
# What the simulators may ask of the rest: plain data.
ARROWS_BACK = {"nxd_cp.schedule", "nxd_cp.nki_refused_python"}


def _modules() -> dict[str, ast.Module]:
    """Of `nxd_cp` without the two linked folders."""
    trees = {}
    for path in sorted((ROOT / "nxd_cp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in ("kernels", "simulators"):
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
            if node.level:  # within a package, only in simulators and kernels
                continue
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


def test_imports_of_the_package_are_absolute_as_the_graph_needs_them() -> None:
    for name, tree in _modules().items():
        levels = [node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any(levels), name


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


def _arrows_back(trees: Iterable[ast.Module]) -> set[str]:
    """What `trees`, of the simulators or kernels, import of the package above them."""
    names = set(_modules())
    return set().union(*(_imported(tree, names) for tree in trees))


def test_simulators_ask_for_plain_data_alone_and_kernels_for_nothing() -> None:
    simulators, kernels = (
        [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / top).rglob("*.py")]
        for top in ("simulators", "kernels")
    )
    assert _arrows_back(simulators) == ARROWS_BACK
    assert _arrows_back(kernels) == set()


def test_an_arrow_back_to_the_ring_is_caught() -> None:
    tree = ast.parse("def run():\n    from nxd_cp.ring import forward\n")
    assert _arrows_back([tree]) == {"nxd_cp.ring"}


def test_an_import_for_type_checkers_is_free() -> None:
    trees = _modules()
    trees["nxd_cp.loss"] = ast.parse(
        "if TYPE_CHECKING:\n    from nxd_cp.integrations.nxd.loss import token_mean_loss"
    )
    assert _circle(_graph(trees)) == []
