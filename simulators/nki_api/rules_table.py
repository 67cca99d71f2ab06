"""The table of every rule that the simulator enforces, as Markdown.

    python -m nxd_cp.simulators.nki_api.rules_table tests > docs/simulator_rules.md

Reads RULES and the names of the test files that mention each rule. Checks nothing itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .rules import DOCUMENTED, RULES
from .surface import nki_modules

_HEAD = """# Rules of the NKI simulator

Generated from the code by `python -m nxd_cp.simulators.nki_api.rules_table tests`; do not edit.
A broken rule of tier `documented` raises; one of tier `inferred` (reports by third parties, or our
reading of a gap in the documentation) warns, and raises under `SimParams(strict=True)`.
For every rule `tests/rule_pairs/` has one kernel with a good and a bad argument: the good call
breaks no rule at all, the bad one breaks this rule and shows its own line. The last column lists
the files with more tests of it.

{documented} documented, {inferred} inferred.

| Rule | Tier | What must hold | Source | More tests |
|---|---|---|---|---|
"""


def rules_table(tests: Path) -> str:
    """The table; `tests` is the folder whose test_nki_*.py files name the rules."""
    nki_modules()  # every rule is registered when its module is imported
    files = {path.name: path.read_text(encoding="utf-8") for path in tests.glob("test_nki_*.py")}
    documented = sum(rule.tier == DOCUMENTED for rule in RULES.values())
    text = _HEAD.format(documented=documented, inferred=len(RULES) - documented)
    for rule in sorted(RULES.values(), key=lambda rule: rule.id):
        named = sorted(n for n, code in files.items() if rule.id in code.replace("\\", ""))
        cells = (f"`{rule.id}`", rule.tier, rule.text, rule.source, ", ".join(named))
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


if __name__ == "__main__":
    sys.stdout.write(rules_table(Path(sys.argv[1])))
