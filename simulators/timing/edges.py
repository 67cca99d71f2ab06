"""What waits for what: dependency edges between the records of a program.

Does: find, for every record, the earlier records that it waits for, and why. Does not: say how
long.

Note [Which orders hold]
    data: a read waits for the writes of the same bytes (or tensor: `granularity`). war/waw: a write
    waits for earlier accesses; by the same engine it only keeps their order, and TensorE adds onto
    PSUM in order without waiting. bank/space: a new PSUM tensor waits for the last use of the bank
    that it takes over, a new SBUF tensor for the bytes that it takes over. Placement is our own,
    first dead first reused: a log does not say how the vendor's compiler would place the tensors.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nxd_cp.simulators.nki_api import chips
from nxd_cp.simulators.nki_api.log import NONE

from .access import Access, overlap

if TYPE_CHECKING:
    from .program import Program

Edge = tuple[int, str]  # (predecessor, kind)


def dependency_edges(program: Program) -> list[list[Edge]]:
    """Predecessors of every record, with the kind: data, war, waw, bank or space."""
    return _Edges(program).edges


class _Edges:
    """Dependency edges of a program, by one walk in program order.

    With "tensor" granularity the first view of a tensor stands for all of them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.edges: list[list[Edge]] = []
        self.readers: dict[int, dict[str, int]] = {}
        self.writers: dict[int, dict[str, int]] = {}
        self.last_use: dict[int, dict[str, int]] = defaultdict(dict)
        self.room: dict[int, list[tuple[int, str, str]]] = {}
        self.reorders = program.options.order == "list"
        whole = program.options.granularity == "tensor"
        fenced = whole or program.options.granularity == "fenced"
        first: dict[int, int] = {}
        self.stands_for = [
            first.setdefault(access.buffer, view)
            if (fenced if access.space == "hbm" else whole)
            else view
            for view, access in enumerate(program.accesses)
        ]
        self.overlaps = [[view] for view in self.stands_for] if whole else self._overlaps()
        self.before = _placement(program)
        for record in range(len(program)):
            self.edges.append(self._visit(record))

    def _overlaps(self) -> list[list[int]]:
        """Per view, the views whose bytes it shares, itself included."""
        program = self.program
        written: dict[int, set[int]] = defaultdict(set)
        used: dict[int, set[int]] = defaultdict(set)
        for reads, writes in zip(program.reads, program.writes, strict=True):
            for view in writes:
                written[program.accesses[view].buffer].add(view)
                used[program.accesses[view].buffer].add(view)
            for view in reads:
                used[program.accesses[view].buffer].add(view)
        result: list[list[int]] = [[] for _ in program.accesses]
        for buffer, views in used.items():
            mine = written[buffer]
            if not mine:
                continue  # only read: nothing waits
            if program.log.buffers[buffer].space == "hbm" and (
                program.options.granularity == "fenced"
            ):
                for view in views:
                    result[view] = [self.stands_for[view]]
                continue
            if mine == views and program.log.buffers[buffer].space == "hbm":
                for view in views:
                    result[view] = [view]
                continue
            for view, other in _touching(sorted(views), program.accesses):
                if view in mine or other in mine:
                    result[view].append(other)
                    if view != other:
                        result[other].append(view)
        for found in result:
            found.sort()
        return result

    def _visit(self, record: int) -> list[Edge]:
        program, queue = self.program, self.program.queues[record]
        found: dict[int, str] = {}
        for view in program.writes[record]:
            for last, user, kind in self._room(record, view):
                if user != queue:
                    found[last] = kind
                elif self.reorders:
                    found.setdefault(last, "engine")
            for other in self.overlaps[view]:
                for user, last in self.readers.get(other, {}).items():
                    if user != queue:
                        found[last] = "war"
                    elif self.reorders:
                        found.setdefault(last, "engine")
                for user, last in self.writers.get(other, {}).items():
                    if user != queue or queue.startswith("dma"):
                        found[last] = "waw"
                    elif self.reorders:
                        found.setdefault(last, "engine")
        for view in program.reads[record]:
            for other in self.overlaps[view]:
                for user, last in self.writers.get(other, {}).items():
                    if not (user == queue == "tensor"):
                        found[last] = "data"
                    elif self.reorders:
                        found.setdefault(last, "engine")
        self._note(record, queue)
        return [(last, kind) for last, kind in sorted(found.items()) if last != record]

    def _room(self, record: int, view: int) -> list[tuple[int, str, str]]:
        """Last uses of what lay where this tensor now goes; empty once the tensor has been read."""
        program, buffer = self.program, self.program.accesses[view].buffer
        taken = self.before.get((record, view))
        if taken is not None:
            kind = "bank" if program.accesses[view].space == "psum" else "space"
            self.room[buffer] = [
                (last, user, kind)
                for previous in taken
                for user, last in self.last_use[previous].items()
            ]
        return self.room.get(buffer, [])

    def _note(self, record: int, queue: str) -> None:
        program = self.program
        reads = {self.stands_for[view] for view in program.reads[record]}
        writes = {self.stands_for[view] for view in program.writes[record]}
        for view in reads:
            self.room.pop(program.accesses[view].buffer, None)
            self.readers.setdefault(view, {})[queue] = record
        for view in writes:
            if view in reads:
                self.writers.setdefault(view, {})[queue] = record
            else:
                self.readers[view] = {}
                self.writers[view] = {queue: record}
        for view in reads | writes:
            self.last_use[program.accesses[view].buffer][queue] = record


def _touching(views: list[int], accesses: list[Access]) -> Iterator[tuple[int, int]]:
    """Pairs of views that share bytes, each once, equal pairs included.

    A sweep by first byte: only views that reach over the next one's start are compared.
    """
    open_views: list[int] = []
    for view in sorted(views, key=lambda v: (accesses[v].low, v)):
        mine = accesses[view]
        open_views = [other for other in open_views if accesses[other].high > mine.low]
        for other in open_views:
            if overlap(mine, accesses[other]):
                yield view, other
        yield view, view
        open_views.append(view)


def _placement(program: Program) -> dict[tuple[int, int], tuple[int, ...]]:
    """(record, view) of the first write of an on-chip tensor -> the tensors whose room it takes."""
    first: dict[int, tuple[int, int]] = {}
    last: dict[int, int] = {}
    for record, (reads, writes) in enumerate(zip(program.reads, program.writes, strict=True)):
        for view in (*writes, *reads):
            buffer = program.accesses[view].buffer
            first.setdefault(buffer, (record, view))
            last[buffer] = record
    order = sorted(first, key=lambda buffer: first[buffer][0])
    result: dict[tuple[int, int], tuple[int, ...]] = {}
    chip = chips.chip_for(program.generation)
    for space in ("psum", "sbuf"):
        mine = [b for b in order if program.log.buffers[b].space == space]
        sizes = {b: program.log.buffers[b].row_bytes for b in mine}
        if space == "psum":
            size = chips.PSUM_BANK_BYTES
            units = {b: -(-n // size) for b, n in sizes.items()}
            taken = _reuse(mine, units, chips.PSUM_BANKS, first, last)
        else:
            taken = _reuse(mine, sizes, chip.sbuf_usable_bytes, first, last)
        result.update({first[b]: previous for b, previous in taken.items() if previous})
    return result


def _reuse(
    buffers: list[int],
    sizes: dict[int, int],
    capacity: int,
    first: dict[int, tuple[int, int]],
    last: dict[int, int],
) -> dict[int, tuple[int, ...]]:
    """Room taken over by each buffer, oldest dead room first.

    When more is alive than fits, the rest shares without waiting: the log was legal elsewhere.
    """
    free: deque[list[int]] = deque([[capacity, NONE]])
    alive: list[tuple[int, int]] = []
    taken: dict[int, tuple[int, ...]] = {}
    for buffer in buffers:
        now = first[buffer][0]
        dead = sorted(item for item in alive if item[0] < now)
        alive = [item for item in alive if item[0] >= now]
        free.extend([sizes[b], b] for _, b in dead)
        need, previous = sizes[buffer], []
        while need > 0 and free:
            room = free[0]
            used = min(need, room[0])
            need -= used
            room[0] -= used
            if room[1] != NONE:
                previous.append(room[1])
            if room[0] == 0:
                free.popleft()
        taken[buffer] = tuple(previous)
        alive.append((last[buffer], buffer))
        sizes[buffer] -= need  # what it shares is not given back twice
    return taken
