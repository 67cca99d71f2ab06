"""A run: for every case first the numerics, then, only when they are right, the time."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import Protocol

from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import Implementation
from nxd_cp.bench.numerics import Check, check, checked_case
from nxd_cp.bench.report import Report, Row, Times

Progress = Callable[[int, int, str], None]


class Timer(Protocol):
    """source: "simulated" or "measured"."""

    @property
    def source(self) -> str:
        """See the class."""
        ...

    def time(self, case: Case, implementation: Implementation) -> Times:
        """The time of one launch."""
        ...


@dataclass(frozen=True)
class Plan:
    """What to run. device: where tensors of the numerics check lie."""

    target: str
    cases: Sequence[Case]
    implementations: Sequence[Implementation]
    timer: Timer
    peak_tflops: float
    device: str = "cpu"
    notes: tuple[str, ...] = ()


def run(plan: Plan, progress: Progress = lambda done, total, what: None) -> Report:
    """The report of all cases. progress(done, total, what) is called before each."""
    report = Report(plan.target, plan.timer.source, plan.peak_tflops, conditions(plan.timer))
    report.notes += plan.notes
    checks: dict[tuple[str, Case], Check] = {}
    pairs = [(one, case) for one in plan.implementations for case in plan.cases]
    for done, (implementation, case) in enumerate(pairs):
        progress(done, len(pairs), f"{case} by {implementation.name}")
        refusal = implementation.refuses(case)
        if refusal:
            if refusal not in report.notes:
                report.notes.append(refusal)
            continue
        short = checked_case(case, implementation)
        key = (implementation.name, short)
        if key not in checks:
            checks[key] = check(short, implementation, plan.device)
        report.rows.append(_row(case, implementation, checks[key], plan.timer))
    progress(len(pairs), len(pairs), "done")
    return report


def _row(case: Case, implementation: Implementation, checked: Check, timer: Timer) -> Row:
    return Row(
        str(case),
        case.series,
        case.queries,
        implementation.name,
        case.flops,
        checked.text,
        checked.passed,
        timer.time(case, implementation) if checked.passed else None,
    )


def conditions(timer: Timer) -> dict[str, str]:
    """What a reader of the numbers must know."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "host": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "times": "estimated by nxd_cp.simulators.timing; see docs/timing.md"
        if timer.source == "simulated"
        else "measured on this host's Neuron device",
    }
    for name in ("nxd-cp", "torch", "nki", "neuronx-cc", "torch-neuronx", "neuronx-distributed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
