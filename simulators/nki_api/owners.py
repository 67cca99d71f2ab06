"""Placed tensors that share bytes: which of them wrote a cell last.

Tensors of one rectangle form a group; a group is shared once a second live tensor lies over any of
its bytes, and only then are writes noted. A tensor over whose bytes nobody else has written since
its own first write is clean, which is all that most reads need to know; the others look into a
grid of writers, into which noted writes go when it is asked. Reads of many cells look at one
partition of each quadrant and at the last one.
"""

from __future__ import annotations

import numpy as np

from .region import Grid, Rect, Region, overlap

QUADRANT = 32
MANY = 4096  # cells
BLOCK = 2048
MOST_NOTED = 4096


class Group:
    """The live tensors of one rectangle, and the memory that they lie in."""

    __slots__ = ("clean", "count", "neighbours", "owners", "rect", "shared")

    def __init__(self, owners: Owners, rect: Rect, neighbours: list[Group]) -> None:
        self.owners = owners
        self.rect = rect
        self.count = 0
        self.clean: set[int] = set()
        self.neighbours = neighbours  # groups that share some of its bytes
        self.shared = False


class Owners:
    """The groups of one memory, by the blocks of bytes that they touch, and the last writers."""

    def __init__(self, partitions: int, num_bytes: int) -> None:
        self.size = (partitions, num_bytes)
        self.groups: dict[Rect, Group] = {}
        self.blocks: dict[int, dict[Rect, Group]] = {}
        self.members: dict[int, Group] = {}
        self.noted: list[tuple[int, int, int, Region]] = []  # writes that are not in the grid yet
        self.writers: Grid | None = None  # a tensor's number + 1, 0 for unknown

    def _touched(self, rect: Rect) -> range:
        return range(rect[2] // BLOCK, -(-rect[3] // BLOCK))

    def _new(self, rect: Rect) -> Group:
        touched = [self.blocks.setdefault(block, {}) for block in self._touched(rect)]
        near = {id(g): g for block in touched for g in block.values() if overlap(rect, g.rect)}
        group = self.groups[rect] = Group(self, rect, list(near.values()))
        for block in touched:
            block[rect] = group
        for other in group.neighbours:
            other.neighbours.append(group)
        return group

    def enter(self, number: int, rect: Rect) -> tuple[Group, bool]:
        """The group of tensor `number`, and whether it shares bytes with a live tensor."""
        group = self.groups.get(rect) or self._new(rect)
        group.count += 1
        self.members[number] = group
        shares = group.count > 1 or bool(group.neighbours)
        if shares and not group.shared:
            for member in (group, *group.neighbours):
                member.shared = True
        if not shares and (self.noted or self.writers is not None):
            whole = Region.whole(rect[1] - rect[0], rect[3] - rect[2])
            self._note(0, rect[0], rect[2], whole)
        return group, shares

    def leave(self, number: int) -> None:
        """A tensor is no longer used; one that was never entered is ignored."""
        group = self.members.pop(number, None)
        if group is None:
            return
        group.count -= 1
        group.clean.discard(number)
        if not group.count:
            del self.groups[group.rect]
            for block in self._touched(group.rect):
                del self.blocks[block][group.rect]
            for other in group.neighbours:
                other.neighbours.remove(group)

    def _note(self, cell: int, partition: int, byte: int, region: Region) -> None:
        self.noted.append((cell, partition, byte, region))
        if len(self.noted) > MOST_NOTED:
            self._grid()

    def _grid(self) -> Grid:
        """The writers, up to date."""
        if self.writers is None:
            self.writers = Grid(*self.size, np.int32)
        for cell, partition, byte, region in self.noted:
            self.writers.at(region.moved(partition, byte))[...] = cell
        self.noted.clear()
        return self.writers

    def write(self, number: int, region: Region, new: bool) -> None:
        """Tensor `number` writes these bytes, counted from its start; `new`: it held nothing."""
        group = self.members[number]
        group.clean &= {number}
        if new:
            group.clean.add(number)
        if not group.shared:
            return
        first, _, byte, _ = group.rect
        if group.neighbours:
            bounds = region.moved_rect(first, byte)
            for other in group.neighbours:
                if other.clean and overlap(bounds, other.rect):
                    other.clean.clear()
        self._note(number + 1, first, byte, region)

    def holds(self, number: int, region: Region) -> bool:
        """Whether nobody has written over what tensor `number` holds there."""
        group = self.members[number]
        cells = self._grid().at(region.moved(group.rect[0], group.rect[2]))
        if cells.size > MANY:
            cells = cells[[*range(0, len(cells), QUADRANT), len(cells) - 1]]
        return bool(((cells == number + 1) | (cells == 0)).all())
