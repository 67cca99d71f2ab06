"""Predicted against published: one line a row, then median, 90th percentile and worst per class.

Does: judge the rows of published.py and say what was not run. Does not: run a device, or fit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .published import NS_PER, TIMES, Prediction, Row, not_a_kernel, predict, rows
from .results import Results

# Per use and class: the most that the median, the 90th percentile and the worst may be off, in %.
LIMITS: dict[str, dict[str, tuple[float, float, float]]] = {
    "score": {
        "kernel": (10.0, 25.0, 40.0),
        "primitive": (5.0, 5.0, 5.0),
        "small primitive": (15.0, 15.0, 15.0),
    },
    "score-suite": {"kernel": (10.0, 25.0, 25.0)},
}


@dataclass(frozen=True)
class Scored:
    """A row with its prediction, or None and why it was not run."""

    row: Row
    prediction: Prediction | None
    reason: str = ""

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        assert self.prediction is not None, "only rows that ran have an error"
        return self.prediction.value / self.row.value - 1.0

    @property
    def band(self) -> str:
        """Where the published time lies: "below" the bound, "in", "above" the pessimistic time.

        "-" where the row is no time of a kernel or did not run.
        """
        band = None if self.prediction is None else self.prediction.band
        if band is None:
            return "-"
        if self.row.value < band[0]:
            return "below"
        return "in" if self.row.value <= band[1] else "above"

    @property
    def judged(self) -> str:
        """The class whose limits apply: kernel, short kernel, primitive or small primitive."""
        assert self.prediction is not None, "only rows that ran have a class"
        if self.prediction.kind != "kernel":
            return self.prediction.kind
        ns = NS_PER[self.row.unit] * self.row.value
        total = ns if self.row.metric in TIMES else self.prediction.total_ns
        return "short kernel" if total < 5e4 else "kernel"


def score(
    use: str,
    progress: Callable[[Row], None] | None = None,
    clones: Path | None = None,
    results: Results | None = None,
) -> list[Scored]:
    """All rows of one use, as in the data file; public kernels are run from `clones` if given.

    results: what is there is not run again, and what is run is added.
    """
    result = []
    for row in rows():
        if row.use != use:
            continue
        if progress is not None:
            progress(row)
        if not_a_kernel(row):
            result.append(Scored(row, None, "times a framework, not a kernel: not scorable"))
            continue
        found = results.get(row) if results is not None else None
        if found is None:
            found = predict(row, clones)
            if results is not None:
                results.put(row, found)
        result.append(Scored(row, None, found) if isinstance(found, str) else Scored(row, found))
    return result


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    index = max(0, -(-round(share * 1000) * len(ordered) // 1000) - 1)
    return ordered[min(index, len(ordered) - 1)]


def report(scored: Iterable[Scored], title: str) -> str:
    """The table of one use, with the summary per class and n scored of n scorable."""
    listed = list(scored)
    columns = f"{'predicted':>11} {'published':>11} {'':<6} {'error':>8} {'guess':>6} {'band':>5}"
    out = [title, f"  {columns}  row"]
    out += [_ran_line(item) for item in listed if item.prediction is not None]
    for item in listed:
        if item.prediction is None:
            out.append(
                f"  {'not run':>11} {item.row.value:>11.3f} {item.row.unit:<6} {'':>15}  "
                f"{item.row.group} {item.row.name}: {item.reason}"
            )
    ran = [item for item in listed if item.prediction is not None]
    for kind in sorted({item.judged for item in ran}):
        out.append(f"  {kind}: {_summary([item.error for item in ran if item.judged == kind])}")
    bands = [item for item in ran if item.prediction is not None and item.prediction.band]
    if bands:
        places = [item.band for item in bands]
        out.append(
            f"  times between bound and pessimistic: {places.count('in')} of {len(bands)}, "
            f"{places.count('below')} below the bound, {places.count('above')} above pessimistic"
        )
    scorable = [item for item in listed if not not_a_kernel(item.row)]
    out.append(f"  scored {len(ran)} of {len(scorable)} scorable rows")
    return "\n".join(out)


def _ran_line(item: Scored) -> str:
    found, row = item.prediction, item.row
    assert found is not None, "only rows that ran have numbers"
    guess = "-" if found.guess_share is None else f"{100 * found.guess_share:.0f}%"
    return (
        f"  {found.value:>11.3f} {row.value:>11.3f} {row.unit:<6} {100 * item.error:>+7.1f}% "
        f"{guess:>6} {item.band:>5}  {row.group} {row.name} [{row.generation}, {found.ran}]"
    )


def _summary(errors: list[float]) -> str:
    sizes = [abs(e) for e in errors]
    return (
        f"{len(errors)} rows, median |error| {100 * statistics.median(sizes):.1f} %, "
        f"90th percentile {100 * quantile(sizes, 0.9):.1f} %, "
        f"worst {100 * max(errors, key=abs):+.1f} %, "
        f"median error {100 * statistics.median(errors):+.1f} %"
    )


def limits(scored: Iterable[Scored], use: str) -> list[tuple[str, bool]]:
    """Each limit of a use as a sentence, and whether it is kept; a row that did not run breaks one.

    Uses without limits (those that constants come from) give nothing.
    """
    if use not in LIMITS:
        return []
    listed = [item for item in scored if not not_a_kernel(item.row)]
    missed = sum(item.prediction is None for item in listed)
    below = sum(item.band == "below" for item in listed)
    result = [
        (f"all {len(listed)} scorable rows run ({missed} did not)", missed == 0),
        (f"no published time is below its bound ({below} are)", below == 0),
    ]
    for kind, most in LIMITS[use].items():
        sizes = [
            abs(item.error) * 100
            for item in listed
            if item.prediction is not None and item.judged == kind
        ]
        if not sizes:
            continue
        found = statistics.median(sizes), quantile(sizes, 0.9), max(sizes)
        for name, value, limit in zip(
            ("median", "90th percentile", "worst"), found, most, strict=True
        ):
            text = f"{kind}: {name} {value:.1f} %, at most {limit:.0f} %"
            result.append((text, value <= limit))
    return result
