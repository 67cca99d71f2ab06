"""Placed tensors that share bytes: which of them wrote a cell last.

Tensors of one rectangle form a group; a group is shared once a second live tensor lies over any of
its bytes, and only then are writes noted. A cell is four bytes of one partition. Reads look at one
partition of each quadrant and at the last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .initmap import Pattern, Rect, overlap

CELL = 4
QUADRANT = 32
BLOCK = 2048


class Group:
    """The live tensors of one rectangle, and the memory that they lie in."""

    __slots__ = ("count", "owners", "rect", "shared")

    def __init__(self, owners: Owners, rect: Rect) -> None:
        self.owners = owners
        self.rect = rect
        self.count = 0
        self.shared = False


class Owners:
    """The groups of one memory, by the blocks of bytes that they touch, and the last writers."""

    def __init__(self, partitions: int, num_bytes: int) -> None:
        self.size = (partitions, -(-num_bytes // CELL))
        self.groups: dict[Rect, Group] = {}
        self.blocks: dict[int, dict[Rect, Group]] = {}
        self.members: dict[int, Group] = {}
        self.writers: Any = None  # int32 [partitions, cells]: a tensor's number + 1, 0 for unknown

    def _touched(self, rect: Rect) -> range:
        return range(rect[2] // BLOCK, -(-rect[3] // BLOCK))

    def enter(self, number: int, rect: Rect) -> tuple[Group, bool]:
        """The group of tensor `number`, and whether it shares bytes with a live tensor."""
        group = self.groups.get(rect)
        if group is None:
            group = self.groups[rect] = Group(self, rect)
            for block in self._touched(rect):
                self.blocks.setdefault(block, {})[rect] = group
        group.count += 1
        self.members[number] = group
        others = [
            other
            for block in self._touched(rect)
            for other in self.blocks[block].values()
            if other is not group and overlap(rect, other.rect)
        ]
        shares = group.count > 1 or bool(others)
        for member in (group, *others) if shares else ():
            member.shared = True
        if not shares and self.writers is not None:
            self._region(rect)[...] = 0
        return group, shares

    def leave(self, number: int) -> None:
        """A tensor is no longer used; one that was never entered is ignored."""
        group = self.members.pop(number, None)
        if group is None:
            return
        group.count -= 1
        if not group.count:
            del self.groups[group.rect]
            for block in self._touched(group.rect):
                del self.blocks[block][group.rect]

    def _region(self, rect: Rect) -> Any:
        if self.writers is None:
            self.writers = np.zeros(self.size, np.int32)
        return self.writers[rect[0] : rect[1], rect[2] // CELL : -(-rect[3] // CELL)]

    def _cells(self, rect: Rect, dense: bool, pattern: Pattern) -> Any:
        """The cells of a view: its rectangle, or the exact cells of a strided one."""
        region = self._region(rect)
        partition, byte, counts, strides, item = pattern
        if dense or item % CELL or any(s % CELL for s in strides[1:]):
            return region
        steps = (self.writers.strides[0] * strides[0], *strides[1:])  # a cell is an int32 too
        at = partition * self.writers.strides[0] + byte // CELL * CELL
        return np.ndarray(counts, np.int32, self.writers, at, steps)

    def write(self, number: int, rect: Rect, dense: bool, pattern: Pattern) -> None:
        """Tensor `number` writes these bytes."""
        self._cells(rect, dense, pattern)[...] = number + 1

    def holds(self, number: int, rect: Rect, dense: bool, pattern: Pattern) -> bool:
        """Whether nobody has written over what tensor `number` holds there."""
        cells = self._cells(rect, dense, pattern)
        rows = cells[[*range(0, len(cells), QUADRANT), len(cells) - 1]]
        return bool(((rows == number + 1) | (rows == 0)).all())
