"""Print how the fitted constants of the timing model follow from published rows marked `fit`.

    python scripts/fit_timing.py [PATH_TO_CLONES]

One constant is fitted on public kernels: it needs a folder with a clone of nki-library.
"""

import argparse
from pathlib import Path

import this_clone  # noqa: F401

from nxd_cp.simulators.timing.constants import constants_for
from nxd_cp.simulators.timing.fit import fits, transpose_fit


def main() -> None:
    """One line per fit: the rows' value, the table's value, and the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", nargs="?", type=Path, help="folder with clones of repositories")
    clones = parser.parse_args().clones
    found = [*fits(), *([transpose_fit(clones)] if clones is not None else [])]
    for fit in found:
        constant = getattr(constants_for(fit.generation), fit.constant)
        table = f"{constant.low:g} / {constant.expected:g} / {constant.high:g} {constant.unit}"
        print(f"{fit.generation} {fit.constant:<20} rows give {fit.value:8.3f}, table {table}")
        print(f"{'':<6}{fit.how}")
    if clones is None:
        print("gen3 dma_transpose_share  not fitted: needs a folder with a clone of nki-library")


if __name__ == "__main__":
    main()
