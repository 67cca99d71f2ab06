"""The table of rules that the simulator enforces; each rule is one line where it is used.

A rule has an id, a tier and a source. Tier "documented" raises; tier "inferred" (third-party
reports, or our reading of a gap) warns, and raises under SimParams(strict=True).
Does not check anything itself: see checks.py and isa/.
"""

from __future__ import annotations

from dataclasses import dataclass

DOCUMENTED = "documented"
INFERRED = "inferred"


@dataclass(frozen=True)
class Rule:
    """One rule: `text` is what must hold, `source` the page it is written on."""

    id: str
    tier: str
    source: str
    text: str


RULES: dict[str, Rule] = {}


def documented(rule_id: str, source: str, text: str) -> Rule:
    """Register a rule that AWS documents (module level only, so the table is complete)."""
    return _register(Rule(rule_id, DOCUMENTED, source, text))


def inferred(rule_id: str, source: str, text: str) -> Rule:
    """Register a rule known from elsewhere, or read between the lines."""
    return _register(Rule(rule_id, INFERRED, source, text))


def _register(rule: Rule) -> Rule:
    assert rule.id not in RULES, f"rule {rule.id} is registered twice"
    RULES[rule.id] = rule
    return rule
