"""Instructions, SBUF and PSUM of the block kernels at the lengths of a rank; a table.

    python scripts/kernel_sizes.py                # up to 32768 rows, d 128, bf16

A square of scores is cut into launches as the host cuts it, and each different launch runs once in
the simulator without arithmetic. Exit status 1 where memory is exceeded or a launch is longer than
the host's limit. Counts only: no times.
"""

from __future__ import annotations

import argparse
import sys

import this_clone  # noqa: F401
from kernel_shapes import exceeded, whole_rectangle
from rich.console import Console
from rich.table import Table

from nxd_cp.backends.kernel_limits import Launch
from nxd_cp.simulators.nki_api.chips import CHIPS, PSUM_BYTES

MASKS = ("full", "causal", "strict", "interval")


def main() -> int:
    """Print the table; what is exceeded below it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--heads", type=int, default=1, help="query heads of a key/value head")
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    table = Table(title="one key/value head, bf16; SBUF and PSUM: bytes per partition, at most")
    for name in ("chip", "mask", "rows", "direction", "launches", "instructions", "longest launch"):
        table.add_column(name, justify="right")
    table.add_column("SBUF", justify="right")
    table.add_column("PSUM", justify="right")
    problems = []
    for generation, chip in CHIPS.items():
        for mask in options.masks:
            for rows in options.lengths:
                dim = options.head_dim
                launch = Launch(options.heads, rows, rows, dim, dim, 2, mask)
                totals = zip(("fwd", "bwd"), whole_rectangle(launch, generation), strict=True)
                for direction, total in totals:
                    sizes = f"{total.launches}", f"{total.instructions:,}", f"{total.longest:,}"
                    sbuf = f"{total.sbuf:,} of {chip.sbuf_usable_bytes:,}"
                    psum = f"{total.psum:,} of {PSUM_BYTES:,}"
                    table.add_row(generation, mask, f"{rows}", direction, *sizes, sbuf, psum)
                    said = exceeded(total, chip.sbuf_usable_bytes)
                    if said:
                        problems.append(f"{generation} {mask} {rows} {direction}: {said}")
    console = Console(width=130 if not sys.stdout.isatty() else None)
    console.print(table)
    for said in problems:
        console.print(f"[red]exceeded[/red] {said}", highlight=False)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
