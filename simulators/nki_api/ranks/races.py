"""Who touched a tensor in shared HBM since the two cores last met over it.

Within a core the compiler keeps accesses to a tensor in order. Between the cores of a rank nothing
does but a core_barrier over that tensor, or a collective that both cores call with it. A sendrecv
and a barrier over another tensor order the engine that runs them, not DMAs in flight, so a
conflict across one of these is a warning. Two cores that write the same bytes, and then each read
what they wrote themselves, are warned about too.

With SimParams(adversarial=...), what a core writes lands when it must: when that core touches the
tensor again, at a meeting over the tensor, or at the end.

Source: nki.isa.core_barrier; nki.isa.sendrecv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api.errors import broken, fail, line_text, user_place
from nxd_cp.simulators.nki_api.region import Grid, Region, overlap
from nxd_cp.simulators.nki_api.rules import documented, inferred

_RACE = documented(
    "race.shared_hbm",
    "nki.isa.core_barrier",
    "what one core writes and the other reads is ordered by a core_barrier over it",
)
_WEAK = inferred(
    "race.other_meeting",
    "nki.isa.core_barrier (it blocks one engine; DMAs may be in flight)",
    "the barrier between two cores' accesses is a core_barrier over the tensor that they share",
)
_COLLECTIVE = inferred(
    "race.collective",
    "aws-neuron/nki-library, ring_attention (core_barrier before collective_permute_implicit)",
    "a core_barrier orders what both cores wrote before a collective sends it",
)
_BOTH = inferred(
    "race.both_write",
    "nki.isa.core_barrier (cores write disjoint portions)",
    "cores write disjoint parts of a shared tensor; where both write, the last one stays",
)
_SAME = inferred(
    "race.same_bytes",
    "nki.isa.core_barrier",
    "one core writes a shared tensor; both writing the same bytes works, but nothing orders it",
)
READ, WRITE = 1, 2  # of core 0; core 1's are two bits further on
OLD_TOO = 17  # times a set of bits: also the same four bits further on, before a meeting


@dataclass(frozen=True)
class Access:
    """One access, for the report."""

    write: bool
    region: Region
    line: tuple[str, int]


class Watch:
    """The accesses of both cores to one storage; `meetings` counts those of the rank."""

    def __init__(self, num_bytes: int, meetings: Callable[[], int]) -> None:
        self.num_bytes = num_bytes
        self.cells: Grid | None = None  # once there is something to compare
        self.history: tuple[list[Access], list[Access]] = ([], [])
        self.late: list[tuple[int, Any, Any]] = []  # (core, place, values) not landed yet
        self._meetings = meetings
        self._seen = 0
        self._marked = [0, 0]  # how much of the history is in the cells
        self._written = False

    def read(self, core: int, instr: str, tensor: Any) -> None:
        """A core reads a view; raises or warns if the other may still be writing it."""
        self.land(core)
        self._enter(core, instr, tensor, False, lambda: False)

    def write(
        self, core: int, instr: str, tensor: Any, new: Callable[[], Any] | None, values: bool
    ) -> None:
        """A core writes a view.

        new: gives the elements to be written, where they are known.
        values: False in shape-only mode, in which all writes count as equal.
        """
        self.land(core)
        self._written = True
        same = (lambda: not values) if new is None else (lambda: _equal(tensor, new()))
        self._enter(core, instr, tensor, True, same)

    def send(self, core: int, instr: str, tensor: Any) -> None:
        """A collective that both cores call reads a view; warns if the other core wrote it."""
        access = Access(False, tensor.region, ("", 0))
        self._mark_history()
        bits, other = self._grid().at(access.region), 1 - core
        if (bits & OLD_TOO * (WRITE << 2 * other)).any():
            where = line_text(*self._culprit(other, access, True).line)
            broken(
                _COLLECTIVE, instr, f"core {other} wrote a source at\n    {where}", tensor=tensor
            )

    def met(self) -> None:
        """Both cores met over this tensor: everything before is ordered."""
        self.land()
        self.cells = None
        self.history = ([], [])
        self._marked = [0, 0]
        self._written = False

    def land(self, core: int | None = None) -> None:
        """Carry out the late writes of one core, or of both."""
        if self.late:
            due = [entry for entry in self.late if core in (None, entry[0])]
            self.late = [entry for entry in self.late if core not in (None, entry[0])]
            for _, place, values in due:
                place[...] = values

    def _enter(
        self, core: int, instr: str, tensor: Any, write: bool, same: Callable[[], bool]
    ) -> None:
        access = Access(write, tensor.region, user_place())
        if self._written:
            self._age()
            self._mark_history()
            self._check(core, instr, tensor, access, same)
        self.history[core].append(access)

    def _age(self) -> None:
        """After a meeting over something else, what was marked before it only warns."""
        if self._seen != self._meetings():
            self._mark_history()
            self._seen = self._meetings()
            if self.cells is not None:
                bits = self.cells.cells
                bits |= bits << 4
                bits &= 0xF0

    def _grid(self) -> Grid:
        if self.cells is None:
            self.cells = Grid(1, self.num_bytes, np.uint8)
        return self.cells

    def _mark_history(self) -> None:
        for core in (0, 1):
            for access in self.history[core][self._marked[core] :]:
                bits = self._grid().at(access.region)
                bits |= (WRITE if access.write else READ) << 2 * core
            self._marked[core] = len(self.history[core])

    def _check(
        self, core: int, instr: str, tensor: Any, access: Access, same: Callable[[], bool]
    ) -> None:
        bits = self._grid().at(access.region)
        mine, theirs = 2 * core, 2 * (1 - core)
        if access.write:
            conflicts = (WRITE | READ) << theirs
        else:
            conflicts = WRITE << theirs
            bits = np.where(bits & OLD_TOO * (WRITE << mine), 0, bits)  # our own bytes
        if not (bits & OLD_TOO * conflicts).any():
            return
        was_read = bool((bits & OLD_TOO * (READ << theirs)).any()) and access.write
        first = self._culprit(1 - core, access, not was_read)
        detail = (
            f"core {core} {'writes' if access.write else 'reads'} what core {1 - core} "
            f"{'wrote' if first.write else 'read'} at\n    {line_text(*first.line)}\n    "
        )
        if access.write and same():
            broken(_SAME, instr, f"{detail}with the same bytes", tensor=tensor)
        elif access.write and not was_read:
            broken(_BOTH, instr, f"{detail}with no barrier in between", tensor=tensor)
        elif (bits & conflicts).any():
            fail(_RACE, instr, f"{detail}with nothing between the two", tensor=tensor)
        else:
            broken(_WEAK, instr, f"{detail}with no barrier over it in between", tensor=tensor)

    def _culprit(self, core: int, access: Access, write: bool) -> Access:
        """The other core's latest write or read that may conflict."""
        others = [a for a in self.history[core] if a.write is write]
        return ([a for a in others if overlap(a.region.rect, access.region.rect)] or others)[-1]


def _equal(tensor: Any, values: Any) -> bool:
    new = np.ascontiguousarray(values).tobytes()
    return np.ascontiguousarray(tensor.array).tobytes() == new
