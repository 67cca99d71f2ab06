"""The command line of scripts/run_public_kernels.py.

    run_public_kernels.py PATH [PATH...] [--kernel NAME] [--all | --suite] [--generation gen3]

Exit status: 0 when nothing failed, 1 when a row failed, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nxd_cp.simulators.nki_api.chips import CHIPS, generation_name

from .catalogue import LIBRARY, Kernel, clones_in, library_kernels, library_suite
from .child import Limits
from .outcomes import FAILED, PASSED, SKIPPED, collected, count, forget
from .runner import run
from .scripts import script_kernels
from .table import table

DEFAULT_GENERATION = "gen3"  # trn2, the default platform of nki-library's tests


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_public_kernels.py",
        description="Run public NKI kernels, unmodified, from clones that you have.",
    )
    parser.add_argument("clones", nargs="+", type=Path, metavar="PATH", help="a clone, or clones")
    parser.add_argument("--kernel", action="append", default=[], help="only this one (repeatable)")
    parser.add_argument("--all", action="store_true", help="every row of every listed kernel")
    parser.add_argument(
        "--suite", action="store_true", help="nki-library's whole test suite in simulation mode"
    )
    parser.add_argument(
        "--generation",
        default=DEFAULT_GENERATION,
        help=f"one of {', '.join(CHIPS)} (default {DEFAULT_GENERATION})",
    )
    parser.add_argument(
        "--rows",
        type=int,
        help=f"rows per kernel (default {Limits.rows}; with --all and --suite every row)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the rows that --suite --rows draws (default 0)"
    )
    parser.add_argument(
        "--kernel-seconds",
        type=float,
        help=f"no new row of a kernel after so long (default {Limits.seconds:g}; with --all and "
        "--suite no limit)",
    )
    parser.add_argument("--row-seconds", type=float, default=Limits.row_seconds)
    parser.add_argument("--row-gigabytes", type=float, default=Limits.gigabytes)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("public_kernels"),
        help="folder of the outcomes; a run that was cut off goes on from there",
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier outcomes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _kernels(options: argparse.Namespace, clones: dict[str, Path]) -> list[Kernel]:
    listed = []
    if LIBRARY in clones:
        listed += library_suite(clones[LIBRARY]) if options.suite else library_kernels()
    if not options.suite:
        for clone in clones:
            listed += script_kernels(clone)
    if not options.kernel:
        return listed
    unknown = set(options.kernel) - {kernel.name for kernel in listed}
    if unknown:
        known = ", ".join(kernel.name for kernel in listed)
        raise ValueError(f"expected --kernel of {known}; got {', '.join(sorted(unknown))}")
    return [kernel for kernel in listed if kernel.name in options.kernel]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        generation = generation_name(options.generation)
        clones = clones_in(options.clones)
        kernels = _kernels(options, clones)
        if not kernels:
            raise ValueError("expected a clone of nki-library for --suite, got none")
    except ValueError as error:
        parser.error(str(error))
    mode = "suite" if options.suite else "all" if options.all else "default"
    rows = options.rows or (Limits.rows if mode == "default" else 0)
    limits = Limits(
        rows,
        options.row_seconds,
        options.kernel_seconds or (Limits.seconds if mode == "default" else 0),
        large=mode != "suite",
        gigabytes=options.row_gigabytes,
        seed=str(options.seed) if mode == "suite" and rows else "",
    )
    file = options.results / f"{mode}_{generation}.jsonl"
    if options.fresh:
        forget(file)
    outcomes = run(kernels, clones, file, generation, limits, quiet=options.quiet)
    console = Console()
    every = collected(file)
    drawn = f", {rows} rows a file, seed {limits.seed}" if limits.seed else ""
    title = f"public kernels on {generation} ({mode}{drawn})"
    console.print(table(kernels, outcomes, every, title))
    passed, failed, skipped = (count(outcomes, s) for s in (PASSED, FAILED, SKIPPED))
    total = sum(every.get(kernel.name, 1) for kernel in kernels)
    console.print(
        f"{passed} passed, {failed} failed, {skipped} skipped; {passed + failed} of {total} rows "
        f"ran; outcomes in {file}"
    )
    return int(failed > 0 or passed == 0)
