"""The ranks and cores of one run, what they share, and the points where they meet.

A meeting is one collective, barrier or exchange: every member arrives with terms that must be
equal (kind, groups, sizes, types) and with its own tensors; the last to arrive does the work for
all. Members that meet with different terms are told so, with both lines; members that disagree
about who meets end in a deadlock, which prints where everyone waits. Does not know what happens
in a meeting: see collectives/ and isa/pair.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nxd_cp.simulators.nki_api import chips
from nxd_cp.simulators.nki_api.errors import fail, line_text, user_place
from nxd_cp.simulators.nki_api.memory import Storage
from nxd_cp.simulators.nki_api.rules import documented

from .races import Watch
from .scheduler import Place, Scheduler

_AGREE = documented(
    "ranks.agreement",
    "nki.collectives; Logical NeuronCores guide",
    "all members of a group make the same calls in the same order, with equal groups, sizes and "
    "types",
)


@dataclass
class Arrival:
    """One member's call: `terms` must equal the others', `payload` is its own."""

    run: Any
    terms: dict[str, Any]
    payload: Any
    line: tuple[str, int]


@dataclass
class Meeting:
    """A call that `members` make together; `number` counts the meetings of the run."""

    number: int
    instr: str
    members: tuple[Place, ...]
    world: World
    arrivals: dict[Place, Arrival] = field(default_factory=dict)
    ready: bool = False

    def describe(self, place: Place) -> str:
        """What `place` waits for, where."""
        missing = [str(m) for m in self.members if m not in self.arrivals]
        ended = [str(m) for m in self.members if self.world.scheduler.finished(m)]
        tail = f" (finished: {', '.join(ended)})" if ended else ""
        where = line_text(*self.arrivals[place].line)
        return f"waits in {self.instr} for {', '.join(missing)}{tail}\n    at {where}"


class Rank:
    """What the cores of one rank share: inputs and tensors in shared HBM."""

    def __init__(self, lnc: int) -> None:
        self.lnc = lnc
        self.inputs: dict[int, Any] = {}  # HBM tensors by id of the caller's array
        self.copies: dict[int, Any] = {}  # of arrays that other ranks were given as well
        self.table: dict[tuple[str, str, int], int] = {}  # of its cores' traces
        self.meetings = 0  # of its cores, over anything
        self.watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._shared: dict[Any, tuple[Storage, int]] = {}
        self._counts: dict[Any, int] = {}

    def watch(self, num_bytes: int) -> Watch:
        """A new watch over a tensor in shared HBM."""
        made = Watch(num_bytes, lambda: self.meetings)
        self.watches.add(made)
        return made

    def shared(self, core: int, key: Any, make: Callable[[], Storage]) -> Storage:
        """The storage that the n-th allocation of `key` by every core of the rank refers to."""
        turn = self._counts[core, key] = self._counts.get((core, key), 0) + 1
        storage, taken = self._shared.pop((key, turn), (None, 0))
        if storage is None:
            storage = make()
        if taken + 1 < self.lnc:
            self._shared[key, turn] = (storage, taken + 1)
        return storage


class World:
    """`num_ranks` ranks of `lnc` cores each, in one process."""

    def __init__(self, chip: chips.Chip, num_ranks: int, lnc: int, seed: int | None = None) -> None:
        self.chip = chip
        self.has_grid = False
        self.num_ranks = num_ranks
        self.lnc = lnc
        self.seed = seed
        self.places = [Place(r, c) for r in range(num_ranks) for c in range(lnc)]
        self.scheduler = Scheduler(self.places, seed)
        self.ranks = [Rank(lnc) for _ in range(num_ranks)]
        self._open: list[Meeting] = []
        self._num_meetings = 0

    def cores(self, ranks: tuple[int, ...]) -> tuple[Place, ...]:
        """Every core of these ranks."""
        return tuple(Place(rank, core) for rank in ranks for core in range(self.lnc))

    def meet(
        self,
        run: Any,
        instr: str,
        members: tuple[Place, ...],
        terms: dict[str, Any],
        payload: Any,
        act: Callable[[Meeting], None],
    ) -> Meeting:
        """Wait for all `members`; the last one to arrive runs `act` before anyone goes on."""
        place = run.place
        arrival = Arrival(run, {"instruction": instr, **terms}, payload, user_place())
        meeting = next((m for m in self._open if set(m.members) == set(members)), None)
        if meeting is None:
            meeting = Meeting(self._num_meetings, instr, members, self)
            self._num_meetings += 1
            self._open.append(meeting)
        else:
            self._check(meeting, instr, place, arrival)
        meeting.arrivals[place] = arrival
        if len(meeting.arrivals) == len(meeting.members):
            self._open.remove(meeting)
            act(meeting)
            for rank in {member.rank for member in members}:
                self.ranks[rank].meetings += 1
            meeting.ready = True
        else:
            self.scheduler.wait(place, meeting)
        return meeting

    def _check(self, meeting: Meeting, instr: str, place: Place, arrival: Arrival) -> None:
        """The newcomer's terms against those of the first who waits."""
        first, other = next(iter(meeting.arrivals.items()))
        for name, value in arrival.terms.items():
            theirs = other.terms.get(name)
            if theirs != value:
                fail(
                    _AGREE,
                    instr,
                    f"{name} is {value} on {place}, but {theirs} on {first},\n"
                    f"    which waits at {line_text(*other.line)}",
                )
