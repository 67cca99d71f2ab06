"""The table of public kernels: one line each, with reasons. Runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from .catalogue import Kernel
from .outcomes import FAILED, PASSED, SKIPPED, Outcome, count

_STYLE = {FAILED: "red", SKIPPED: "yellow"}


def reasons(outcomes: Sequence[Outcome]) -> list[tuple[str, str, int]]:
    """(status, first line of the reason, how many rows), failed ones first."""
    found = Counter((o.status, o.reason.partition("\n")[0]) for o in outcomes if o.status != PASSED)
    return sorted(((s, r, n) for (s, r), n in found.items()), key=lambda x: (x[0], -x[2]))


def of_kernel(outcomes: Iterable[Outcome], kernel: Kernel) -> list[Outcome]:
    """The outcomes of one kernel."""
    return [outcome for outcome in outcomes if outcome.kernel == kernel.name]


def table(
    kernels: Sequence[Kernel], outcomes: Sequence[Outcome], rows: Mapping[str, int], title: str
) -> Table:
    """Passed, failed and skipped rows of each kernel, out of `rows` in all; reasons, seconds."""
    made = Table(title=title, show_lines=False)
    made.add_column("kernel")
    for name in (PASSED, FAILED, SKIPPED, "of", "s"):
        made.add_column(name, justify="right")
    made.add_column("reasons", overflow="fold")
    for kernel in kernels:
        own = of_kernel(outcomes, kernel)
        lines = [f"tolerates {rule}" for rule in kernel.tolerated] if own else []
        lines += [f"[{_STYLE[s]}]{n} {s}:[/] {_plain(reason)}" for s, reason, n in reasons(own)]
        counts = [str(count(own, status)) for status in (PASSED, FAILED, SKIPPED)]
        seconds = f"{sum(outcome.seconds for outcome in own):.0f}"
        counts.append(str(rows.get(kernel.name, "")))
        made.add_row(kernel.name, *counts, seconds, "\n".join(lines))
    made.add_section()
    totals = [str(count(outcomes, status)) for status in (PASSED, FAILED, SKIPPED)]
    totals.append(str(sum(rows.get(kernel.name, 1) for kernel in kernels)))
    made.add_row("all", *totals, f"{sum(outcome.seconds for outcome in outcomes):.0f}", "")
    return made


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
