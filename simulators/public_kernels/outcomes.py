"""What became of one row (one call of a public kernel), and the file that remembers it.

The file is JSON lines, one row each, appended as rows end, so a run that is cut off goes on
where it stopped. A row that failed is run again; one that passed or was skipped is not.
Does not run or print anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

PASSED = "passed"
FAILED = "failed"
SKIPPED = "skipped"
GO_ON = 75  # exit status of a child that wants to be started again for the rows that are left


@dataclass(frozen=True)
class Outcome:
    """One row: `status` is "passed", "failed" or "skipped"; `reason` says why it is not passed."""

    kernel: str
    row: str
    status: str
    reason: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """The row as a line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def append(path: Path, outcome: Outcome) -> None:
    """Add one row to the file, at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(outcome.line() + "\n")


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """The last outcome of every (kernel, row); a line that was cut off is ignored."""
    found: dict[tuple[str, str], Outcome] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the process was killed while it wrote
        found[outcome.kernel, outcome.row] = outcome
    return found


def collect(path: Path, kernel: str, rows: int) -> None:
    """Remember, in a file beside `path`, how many rows a kernel has in all."""
    with _beside(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kernel": kernel, "rows": rows}) + "\n")


def collected(path: Path) -> dict[str, int]:
    """How many rows each kernel was found to have."""
    if not _beside(path).exists():
        return {}
    lines = _beside(path).read_text(encoding="utf-8").splitlines()
    return {entry["kernel"]: entry["rows"] for entry in map(json.loads, lines)}


def forget(path: Path) -> None:
    """Forget all outcomes."""
    path.unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_suffix(".collected")


def finished(path: Path, kernel: str) -> set[str]:
    """Rows of `kernel` that need not run again."""
    return {
        row for (of, row), o in read(path).items() if of == kernel and o.status in (PASSED, SKIPPED)
    }


def count(outcomes: Iterable[Outcome], status: str) -> int:
    """How many have this status."""
    return sum(outcome.status == status for outcome in outcomes)
