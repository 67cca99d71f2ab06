"""Runs every generated kernel case and the shapes of public suites; a table at the end.

    python scripts/run_kernel_cases.py            # about 1060 cases, some minutes
    python scripts/run_kernel_cases.py --public   # those of public suites alone

Results go to a file as they come, one line each; a run that was cut off goes on where it stopped
(the same seed, number and file). Exit status 1 when a case fails. The cases are those of
tests/kernel_suite.py: every pair of features on every generation, outputs and gradients against
fp64, within the error of the same maths in the same dtype; and those of tests/kernel_public.py,
which also hold the tolerance of their own suite. Correctness only: no times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import this_clone  # noqa: F401
import torch
from kernel_cases import KernelCase, check
from kernel_public import PUBLIC, PublicCase
from kernel_suite import FEATURES, GENERATIONS, INTERVALS, generate, pairs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nxd_cp.simulators.nki_api import NkiValidationError


def all_cases(seed: int, per_generation: int) -> dict[str, KernelCase]:
    """Generated cases by their text; those under interval masks also skipped at run time."""
    cases = [c for g in GENERATIONS for _, c in generate(seed, per_generation, g)]
    loops = [replace(case, loops=True) for case in cases if case.mask in INTERVALS]
    return {str(case): case for case in [*cases, *loops]}


def run(case: KernelCase | PublicCase) -> tuple[str, str]:
    """The case's text, and what was wrong or nothing."""
    torch.set_num_threads(1)
    try:
        case.check() if isinstance(case, PublicCase) else check(case)
    except (AssertionError, NkiValidationError, ValueError) as error:
        return str(case), f"{type(error).__name__}: {error}"
    return str(case), ""


def load(path: Path, wanted: dict[str, KernelCase]) -> dict[str, str]:
    """Results of an earlier run that this one also asks for."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = dict(json.loads(line) for line in lines)
    return {name: error for name, error in found.items() if name in wanted}


def show(console: Console, seed: int, per_generation: int, results: dict[str, str]) -> None:
    """Cases and failures of each feature level and each generation, then every failure."""
    counts: Counter[tuple[str, str, str]] = Counter()
    failed: Counter[tuple[str, str, str]] = Counter()
    num_pairs = Counter()
    for generation in GENERATIONS:
        cases = generate(seed, per_generation, generation)
        num_pairs[generation] = len(set().union(*(pairs(levels) for levels, _ in cases)))
        for levels, case in cases:
            for name, level in levels.items():
                counts[name, str(level), generation] += 1
                failed[name, str(level), generation] += bool(results[str(case)])
    table = Table("feature", "level", *GENERATIONS, title="cases (failures)")
    for name, levels in FEATURES.items():
        for level in map(str, levels):
            keys = [(name, level, generation) for generation in GENERATIONS]
            cells = [f"{counts[k]}" + f" ({failed[k]})" * bool(failed[k]) for k in keys]
            table.add_row(name, level.removeprefix("torch."), *cells)
    table.add_row("pairs of levels", "", *(str(num_pairs[g]) for g in GENERATIONS))
    console.print(table)
    for name, error in results.items():
        if error:
            console.print(f"[red]failed[/red] {name}: {error}", soft_wrap=True, highlight=False)
    bad = sum(map(bool, results.values()))
    console.print(
        f"seed {seed}: {len(results)} cases, of which {len(PUBLIC)} of public suites; {bad} failed"
    )


def show_public(console: Console, results: dict[str, str]) -> None:
    """One row per case of a public suite."""
    columns = "suite", "there", "here", "o, lse", "gradients", "result"
    table = Table(*columns, title="public suites: their tolerances (rtol, atol), and ours")
    for case in PUBLIC:
        stated = [
            "none stated" if x is None else f"{x.rtol:g}, {x.atol:g}"
            for x in (case.output, case.gradients)
        ]
        table.add_row(case.source, case.theirs, str(case.case), *stated, results[str(case)] or "ok")
    console.print(table)


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-generation", type=int, default=210, help="at least so many")
    parser.add_argument("--results", type=Path, default=Path("kernel_cases.jsonl"))
    parser.add_argument("--limit", type=int, help="stop after so many new cases")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")
    parser.add_argument("--public", action="store_true", help="cases of public suites alone")
    options = parser.parse_args()
    console = Console(width=180 if options.public else None)
    wanted = {str(case): case for case in PUBLIC}
    if not options.public:
        wanted |= all_cases(options.seed, options.per_generation)
    results = load(options.results, wanted)
    missing = [name for name in wanted if name not in results][: options.limit]
    if results:
        console.print(f"{len(results)} of {len(wanted)} cases are in {options.results} already")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    start = time.monotonic()
    with (
        options.results.open("a") as out,
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
        multiprocessing.get_context("spawn").Pool(options.workers) as pool,
    ):
        task = bar.add_task("kernel cases", total=len(missing))
        for name, said in pool.imap_unordered(run, [wanted[name] for name in missing]):
            results[name] = said
            print(json.dumps([name, said]), file=out, flush=True)
            bar.advance(task)
    seconds = time.monotonic() - start
    console.print(f"{len(missing)} cases in {seconds:.0f} s, {options.workers} at a time")
    if len(results) < len(wanted):
        console.print(f"{len(wanted) - len(results)} cases still to run: call again")
    elif options.public:
        show_public(console, results)
    else:
        show(console, options.seed, options.per_generation, results)
    return int(any(results.values()) or len(results) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
