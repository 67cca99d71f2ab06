"""Print what the timing model predicts for published timings, and how far off it is.

    python scripts/validate_timing.py [PATH_TO_CLONES] [--fit]

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nxd_cp.simulators.timing.published import Row
from nxd_cp.simulators.timing.validation import report, score


def main() -> None:
    """Score, print, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", nargs="?", type=Path, help="folder with clones of repositories")
    parser.add_argument("--fit", action="store_true", help="also the rows that constants come from")
    arguments = parser.parse_args()
    begin = time.perf_counter()

    def progress(row: Row) -> None:
        print(f"\r{row.group} {row.kernel[:60]:<64}", end="", file=sys.stderr, flush=True)

    tables = [
        ("score", "Score rows: compared only"),
        ("score-suite", "Rows of the vendor's test list: compared only"),
    ]
    if arguments.fit:
        tables.append(("fit", "Fit rows: constants come from these and others"))
        tables.append(("fit-suite", "Rows of the vendor's test list that one constant comes from"))
    for use, title in tables:
        text = report(score(use, progress, arguments.clones), title)
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
        print(text + "\n")
    print(f"{time.perf_counter() - begin:.0f} s; predictions are estimates, nothing was measured")


if __name__ == "__main__":
    main()
