"""Run all generated ring cases against fp64, and print a table of what came of them.

    python scripts/run_ring_cases.py                        # 2304 cases, resumes where it stopped
    python scripts/run_ring_cases.py --seed 7 --fresh       # other cases, from the start

Every layout x mask x strategy x ring size 1 to 8 comes up four times, with shapes, heads, dtypes
and options drawn from the seed; most run on threads, some over gloo. What a case is and what error
it may have: `tests/ring_cases.py`. Each result is a line of JSON in --out as soon as it is known.
Exits with 1 when any case failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import this_clone  # noqa: F401
import torch
from ranks import RankGroup
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ring_cases import GLOO_RANKS, NUM_CASES, check_case, make_case

Record = dict[str, Any]


def load(path: Path, seed: int) -> dict[int, Record]:
    """Results of an earlier run with this seed, by case number."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {one["number"]: one for one in records if one["seed"] == seed}


def run(numbers: list[int], seed: int, path: Path) -> None:
    """Run these cases; append each result."""
    ranks: RankGroup | None = None
    with path.open("a", encoding="utf-8") as file:
        for number in track(numbers, description="cases", disable=not sys.stderr.isatty()):
            generated = make_case(number, seed)
            if generated.where != "threads" and (ranks is None or ranks.closed):
                ranks = RankGroup(GLOO_RANKS)
            started = time.monotonic()
            record = asdict(check_case(generated, ranks))
            record |= {"seed": seed, "seconds": round(time.monotonic() - started, 3)}
            file.write(json.dumps(record) + "\n")
            file.flush()
    if ranks is not None:
        ranks.close()


def summary(title: str, records: list[Record], key: Callable[[Record], str]) -> Table:
    """Cases, failures and the worst error over what is allowed, by a property."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    table = Table(title, "cases", "failed", "o", "dq", "dk", "dv", "dsinks")
    for name in sorted(groups):
        mine = groups[name]
        worst = [
            max((one["worst"].get(tensor, 0.0) for one in mine), default=0.0)
            for tensor in ("o", "dq", "dk", "dv", "dsinks")
        ]
        failed = sum(bool(one["problems"]) for one in mine)
        table.add_row(
            name, str(len(mine)), str(failed), *(f"{min(value, 999):.2f}" for value in worst)
        )
    return table


def main() -> int:
    """Run what is missing; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=NUM_CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ring_cases.jsonl"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        options.out.unlink(missing_ok=True)
    done = load(options.out, options.seed)
    console = Console(width=100)
    console.print(
        f"{platform.machine()}, torch {torch.__version__}, seed {options.seed}: {options.cases} "
        f"cases, {len(done)} known from {options.out}"
    )
    run([n for n in range(options.cases) if n not in done], options.seed, options.out)
    known = load(options.out, options.seed)
    records = [known[number] for number in range(options.cases)]
    console.print("largest error over what is allowed (at most 1), by tensor:")
    for title, key in (
        ("layout", lambda one: one["layout"]),
        ("mask", lambda one: one["mask"]),
        ("strategy", lambda one: one["strategy"]),
        ("ranks", lambda one: str(one["size"])),
        ("dtype", lambda one: one["dtype"]),
        ("messages", lambda one: one["where"]),
    ):
        console.print(summary(title, records, key))
    failed = [one for one in records if one["problems"]]
    for one in failed:
        console.print(one["name"], one["problems"], style="red", highlight=False)
    seconds = sum(one["seconds"] for one in records)
    console.print(f"{len(records)} cases, {len(failed)} failed, {seconds:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
