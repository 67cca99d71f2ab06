"""Print how the fitted constants of the timing model follow from published rows marked `fit`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nxd_cp.simulators.timing.constants import constants_for
from nxd_cp.simulators.timing.fit import fits


def main() -> None:
    """One line per fit: the rows' value, the table's value, and the arithmetic."""
    for fit in fits():
        constant = getattr(constants_for(fit.generation), fit.constant)
        table = f"{constant.low:g} / {constant.expected:g} / {constant.high:g} {constant.unit}"
        print(f"{fit.generation} {fit.constant:<20} rows give {fit.value:8.2f}, table {table}")
        print(f"{'':<6}{fit.how}")


if __name__ == "__main__":
    main()
