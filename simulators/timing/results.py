"""Predictions kept in a file, so that a validation that was cut off goes on where it was.

Does: look up and append one prediction a row, as long as the code that makes them and the kernels'
folder are the same. Does not: judge, or decide what is run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from .published import Prediction, Row

CODE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the simulator's and the time model's source."""
    digest = hashlib.sha256()
    for file in sorted(CODE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Results:
    """A file of JSON lines; `fresh` starts it anew. Lines of other code are left and not read."""

    def __init__(self, path: Path, clones: Path | None, *, fresh: bool = False) -> None:
        self.path = path
        self.base = f"{_code()} {clones.resolve() if clones else 'no clones'}"
        self.known: dict[str, Prediction | str] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                found = entry["found"]
                if not isinstance(found, str):
                    band = found.pop("band")
                    found = Prediction(**found, band=tuple(band) if band else None)
                self.known[entry["key"]] = found

    def get(self, row: Row) -> Prediction | str | None:
        """The prediction of a row, why it was not run, or None when it was not tried yet."""
        return self.known.get(self._key(row))

    def put(self, row: Row, found: Prediction | str) -> None:
        """Keep what was found for a row."""
        key = self._key(row)
        self.known[key] = found
        entry = {"key": key, "found": found if isinstance(found, str) else asdict(found)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _key(self, row: Row) -> str:
        text = f"{self.base} {sorted(asdict(row).items())}"
        return hashlib.sha256(text.encode()).hexdigest()
