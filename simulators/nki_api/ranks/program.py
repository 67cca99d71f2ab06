"""Whether the two cores of a rank ran the same program: its device loops and its instructions.

Keeps one number per instruction and core, and compares when both have ended. Cores whose Python
branches on program_id issue different instructions; compilers have been seen to reject that, and
public kernels that do it run, so it only warns.

Source: Logical NeuronCores guide (final notes).
"""

from __future__ import annotations

from array import array

from nxd_cp.simulators.nki_api.errors import blamed, broken, fail, line_text, user_place
from nxd_cp.simulators.nki_api.rules import documented, inferred

_LOOPS = documented(
    "lnc.device_loops",
    "Logical NeuronCores guide",
    "device loops and their trip counts are the same on both cores",
)
_SAME = inferred(
    "lnc.same_program",
    "compiler error NCC_IXGM002, as reported by users",
    "both cores run the same instructions in the same order",
)
LOOP = "device loop"
ITERATION = "loop iteration"


class Trace:
    """What one core issued: numbers of (name, file, line), from a table that the cores share."""

    def __init__(self, table: dict[tuple[str, str, int], int]) -> None:
        self.table = table
        self.rows = array("I")

    def add(self, name: str) -> None:
        """Enter an instruction, or the start or an iteration of a device loop."""
        self.rows.append(self.table.setdefault((name, *user_place()), len(self.table)))


def compare(rank: int, one: Trace, two: Trace) -> None:
    """Raise or warn if the cores of a rank did not run the same program."""
    if one.rows == two.rows:
        return
    entries = list(one.table)
    programs = [[entries[number] for number in trace.rows] for trace in (one, two)]
    loops = [[e for e in p if e[0] in (LOOP, ITERATION)] for p in programs]
    difference = _difference(*loops)
    if difference is not None:
        with blamed(difference[1]):
            fail(_LOOPS, "nki.jit", f"rank {rank}: {difference[0]}")
    difference = _difference(*programs)
    if difference is not None:
        with blamed(difference[1]):
            broken(_SAME, "nki.jit", f"rank {rank}: {difference[0]}")


def _difference(
    one: list[tuple[str, str, int]], two: list[tuple[str, str, int]]
) -> tuple[str, tuple[str, int]] | None:
    """Where the names in two lists first differ, in words and as (file, line); None if nowhere."""
    end = ("the end", "", 0)
    length = max(len(one), len(two))
    for at in range(length):
        a, b = (p[at] if at < len(p) else end for p in (one, two))
        if a[0] != b[0]:
            lines = [f"core {c} has {e[0]} at {line_text(*e[1:])}" for c, e in ((0, a), (1, b))]
            place = a[1:] if a[1] else b[1:]
            return f"entry {at} differs\n    {lines[0]}\n    {lines[1]}", place
    return None
