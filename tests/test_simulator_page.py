"""docs/simulator.md: its tables are the code's, its snippet does what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from nxd_cp.simulators.nki_api import coverage, isa
from nxd_cp.simulators.nki_api.rules import RULES

PATH = Path(__file__).parents[1] / "docs" / "simulator.md"
PAGE = PATH.read_text(encoding="utf-8")


def test_the_tables_are_current():
    assert coverage.with_tables(PAGE) == PAGE, (
        "run python -m nxd_cp.simulators.nki_api.coverage docs/simulator.md"
    )


def test_a_stale_table_is_caught():
    stale = PAGE.replace("`nki.isa.tensor_copy`", "`nki.isa.tensor_move`")
    assert coverage.with_tables(stale) == PAGE != stale


def test_a_page_without_a_place_for_the_tables_is_refused():
    with pytest.raises(ValueError, match="expected <!-- coverage -->"):
        coverage.with_tables("# nothing")


def test_the_snippet_names_the_rule_and_the_line():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(PATH), "exec"), {"__name__": "snippet"})
    assert "rule memory.uninitialised (documented" in printed.getvalue()
    line = code.splitlines().index(
        "    nisa.activation(dst=out, op=nl.exp, data=tile)  # the last column was never loaded"
    )
    assert f"simulator.md:{line + 1}:" in printed.getvalue()


@pytest.mark.parametrize(
    ("name", "generation", "rule"),
    [
        ("tensor_copy", 2, "tensor_copy.uninitialised"),
        ("nc_matmul", 2, "nc_matmul.bank"),
        ("range_select", 3, "range_select.bounds"),
        ("activate2", 4, "instruction.generation"),
    ],
)
def test_coverage_follows_an_instruction_to_its_rules(name, generation, rule):
    row = coverage.coverage_of("isa", name, getattr(isa, name))
    assert row.first_generation == generation
    assert rule in row.rules
    assert row.rules <= set(RULES)
    assert "nc_matmul.bank" not in coverage.coverage_of("isa", "iota", isa.iota).rules


def test_helpers_are_no_functions_of_the_language():
    names = set(coverage.language_names())
    assert {"fori_loop", "softmax", "where"} <= names
    assert not {"current", "documented", "fail", "guarded"} & names


def test_most_rules_of_instructions_are_in_the_table():
    reached = {rule for row in coverage.instructions() for rule in row.rules}
    names = {row.name for row in coverage.instructions()}
    theirs = {rule for rule in RULES if rule.partition(".")[0] in names}
    assert theirs <= reached, sorted(theirs - reached)
