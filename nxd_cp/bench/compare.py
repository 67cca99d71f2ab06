"""Two runs beside each other: what became slower by more than a threshold, what is gone.

Only runs of one kind are compared: a simulated time and a measured one have no common column.
"""

from __future__ import annotations

from dataclasses import dataclass

from nxd_cp.bench.report import Report, Row


@dataclass(frozen=True)
class Change:
    """One case. before, after: us, None without a time. verdict: one of `VERDICTS`."""

    case: str
    before: float | None
    after: float | None
    verdict: str

    @property
    def bad(self) -> bool:
        """Whether the comparison fails because of it."""
        return self.verdict in ("slower", "gone", "now fails its numerics check")


def compare(before: Report, after: Report, threshold: float) -> list[Change]:
    """A change per case of either run. threshold: 0.05 allows 5 % more time.

    Raises ValueError for runs of different targets or sources, or a threshold below 0.
    """
    if (before.target, before.source) != (after.target, after.source):
        raise ValueError(
            f"expected two runs of one target and source, got {before.target} {before.source} and "
            f"{after.target} {after.source}"
        )
    if threshold < 0:
        raise ValueError(f"threshold: expected at least 0, got {threshold}")
    old, new = _by_case(before), _by_case(after)
    return [_change(key, old.get(key), new.get(key), threshold) for key in {**old, **new}]


def text(changes: list[Change], threshold: float) -> str:
    """For a terminal."""
    width = max((len(change.case) for change in changes), default=4)
    out = [f"{'case':<{width}}  {'before us':>10}  {'after us':>10}  {'change':>8}"]
    for change in changes:
        cells = [_number(change.before), _number(change.after), "-"]
        if change.before is not None and change.after is not None:
            cells[2] = f"{100 * (change.after / change.before - 1):+.1f} %"
        numbers = f"{cells[0]:>10}  {cells[1]:>10}  {cells[2]:>8}"
        out.append(f"{change.case:<{width}}  {numbers}  {change.verdict}")
    num_bad = sum(change.bad for change in changes)
    out.append(f"{num_bad} of {len(changes)} worse (threshold {100 * threshold:g} %)")
    return "\n".join(out)


def _by_case(report: Report) -> dict[str, Row]:
    return {f"{row.case} by {row.implementation}": row for row in report.rows}


def _change(case: str, old: Row | None, new: Row | None, threshold: float) -> Change:
    before, after = _us(old), _us(new)
    if old is None or new is None:
        return Change(case, before, after, "new" if old is None else "gone")
    if after is None:
        verdict = "now fails its numerics check" if before is not None else "fails as before"
    elif before is None:
        verdict = "passes now"
    elif after > before * (1 + threshold):
        verdict = "slower"
    else:
        verdict = "faster" if after * (1 + threshold) < before else "same"
    return Change(case, before, after, verdict)


def _us(row: Row | None) -> float | None:
    return None if row is None or row.times is None else row.times.us[row.times.main]


def _number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"
