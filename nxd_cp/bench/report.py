"""The results of a run: as data (JSON), as text, and as Markdown.

Every row carries the source of its time, "simulated" or "measured", and a row whose numerics check
failed has no time at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Times:
    """us: times of one launch in microseconds by name. main: the name that speeds are made of."""

    main: str
    us: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One case by one implementation. times is None when the numerics check failed."""

    case: str
    series: str
    length: int
    implementation: str
    flops: float
    numerics: str
    passed: bool
    times: Times | None

    def tflops(self) -> float | None:
        """TFLOP/s over visible pairs; None without a time."""
        return None if self.times is None else self.flops / self.times.us[self.times.main] / 1e6


@dataclass
class Report:
    """One run. conditions: what it ran on, for people. peak_tflops: bf16, of the cores used."""

    target: str
    source: str
    peak_tflops: float
    conditions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mfu(self, row: Row) -> float | None:
        """Share of the bf16 peak, 0 to 1."""
        speed = row.tflops()
        return None if speed is None else speed / self.peak_tflops

    @property
    def refused(self) -> list[Row]:
        """Rows whose numerics check failed."""
        return [row for row in self.rows if not row.passed]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote. Raises ValueError for another file."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            if data.pop("schema") != SCHEMA:
                raise KeyError("schema")
            rows = [
                Row(**{**row, "times": Times(**row["times"]) if row["times"] else None})
                for row in data.pop("rows")
            ]
            return cls(**data, rows=rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a report of nxd-cp bench in {path}: {error}") from error


HEADS = {
    "simulated": ("bound", "expected", "pessimistic"),
    "measured": ("p50", "p90", "p99", "min", "max"),
}
LABELS = {
    "simulated": "SIMULATED: estimated from instructions, not measured on a device",
    "measured": "measured on a device",
}


def table(report: Report) -> list[list[str]]:
    """Head and rows as text, one cell each; "-" where there is no number."""
    names = [
        n for n in HEADS[report.source] if any(r.times and n in r.times.us for r in report.rows)
    ]
    head = ["case", "by", *(f"{name} us" for name in names), "TFLOP/s", "MFU", "numerics"]
    lines = [head]
    for row in report.rows:
        cells = [row.case, row.implementation]
        speed, mfu = row.tflops(), report.mfu(row)
        if row.times is None or speed is None or mfu is None:
            cells += ["-"] * (len(names) + 2)
        else:
            cells += [f"{row.times.us[n]:.1f}" if n in row.times.us else "-" for n in names]
            cells += [f"{speed:.2f}", f"{100 * mfu:.1f} %"]
        lines.append([*cells, "ok" if row.passed else "FAILED: no speed"])
    return lines


def text(report: Report) -> str:
    """For a terminal."""
    lines = table(report)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = [f"{report.target}, {LABELS[report.source]}; MFU of {report.peak_tflops:.1f} TFLOP/s"]
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        out.append("  ".join(cells).rstrip())
    out += [f"{row.case} by {row.implementation}: {row.numerics}" for row in report.refused]
    return "\n".join([*out, *report.notes])


def markdown(report: Report) -> str:
    """A page: conditions, the table, what was refused."""
    head, *lines = table(report)
    out = [f"# Kernel benchmark, {report.target}", "", f"**{LABELS[report.source]}.**", ""]
    out += [f"- {name}: {value}" for name, value in report.conditions.items()]
    out += [f"- MFU: of the bf16 peak, {report.peak_tflops:.1f} TFLOP/s", ""]
    out += ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]]
    out += [""] + [
        f"- {row.case} by {row.implementation}: {row.numerics}" for row in report.refused
    ]
    out += [f"- {note}" for note in report.notes]
    return "\n".join(out).rstrip() + "\n"
