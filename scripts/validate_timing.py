"""Print what the timing model predicts for published timings, and how far off it is.

    python scripts/validate_timing.py [PATH_TO_CLONES] [--fit] [--results FILE [--fresh]]

With a folder of clones (aws-neuron-sdk, nki-library, nki-samples) the kernels behind the rows are
run, as they are, in the simulator's shape-only mode; without, and where they do not run, streams
written from their descriptions stand in. Runs on this CPU; nothing is measured. Rows marked `score`
are compared only, and so are those marked `score-suite`, which come from a vendor's own test list;
with --fit also the rows that constants were taken from, which say how well the model can fit, not
how well it predicts. A row that could be scored and did not run counts as a miss.
"""

import argparse
import sys
import time
from pathlib import Path

import this_clone  # noqa: F401

from nxd_cp.simulators.timing.published import Row, rows
from nxd_cp.simulators.timing.results import Results
from nxd_cp.simulators.timing.validation import limits, report, score

TABLES = [
    ("score", "Score rows: compared only"),
    ("score-suite", "Rows of the vendor's test list: compared only"),
]
FITS = [
    ("fit", "Fit rows: constants come from these and others"),
    ("fit-suite", "Rows of the vendor's test list that one constant comes from"),
]


def main() -> int:
    """Score, print, and say how long it took and which limits were kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", nargs="?", type=Path, help="folder with clones of repositories")
    parser.add_argument("--fit", action="store_true", help="also the rows that constants come from")
    parser.add_argument("--results", type=Path, help="keep predictions here, and go on from them")
    parser.add_argument("--fresh", action="store_true", help="start the results anew")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    results = None
    if arguments.results is not None:
        results = Results(arguments.results, arguments.clones, fresh=arguments.fresh)
    tables = TABLES + (FITS if arguments.fit else [])
    total = sum(row.use in dict(tables) for row in rows())
    done = 0

    def progress(row: Row) -> None:
        nonlocal done
        done += 1
        text = f"{done} of {total}: {row.group} {row.kernel[:50]}"
        print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)

    kept = []
    for use, title in tables:
        scored = score(use, progress, arguments.clones, results)
        print("\r" + " " * 78 + "\r", end="", file=sys.stderr)
        print(report(scored, title) + "\n")
        kept += limits(scored, use)
    for text, good in kept:
        print(f"  {'kept    ' if good else 'NOT KEPT'} {text}")
    print(f"{time.perf_counter() - begin:.0f} s; predictions are estimates, nothing was measured")
    return 0 if all(good for _, good in kept) else 1


if __name__ == "__main__":
    sys.exit(main())
