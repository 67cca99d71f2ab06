"""Where there is room: free intervals of a memory.

Knows bytes only, neither tensors nor rules.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import itemgetter


class FreeList:
    """First-fit free intervals of [0, size); blocks of at most `block` bytes never cross one."""

    def __init__(self, size: int, block: int = 0) -> None:
        self.size = size
        self.block = block
        self.free: list[tuple[int, int]] = [(0, size)]
        self.used = 0
        self.peak = 0
        self.reserved = 0
        self._taken: set[tuple[int, int]] = set()

    def take(self, num_bytes: int) -> int | None:
        """The address of a new block, or None; high addresses first (people place from 0)."""
        for index in range(len(self.free) - 1, -1, -1):
            start, end = self.free[index]
            at = self._fit(end, num_bytes)
            if at >= start:
                pieces = [p for p in ((start, at), (at + num_bytes, end)) if p[0] < p[1]]
                self.free[index : index + 1] = pieces
                self.used += num_bytes
                self.peak = max(self.peak, self.used)
                return at
        return None

    def _fit(self, end: int, num_bytes: int) -> int:
        """The highest start of a block that ends at or before `end`."""
        at, block = end - num_bytes, self.block
        if not block:
            return at
        if num_bytes > block:
            return at // block * block
        limit = (end - 1) // block * block  # start of the last block before `end`
        return at if at >= limit else limit - num_bytes

    def holds(self, start: int, end: int) -> bool:
        """Whether exactly [start, end) was reserved before."""
        return (start, end) in self._taken

    def reserve(self, start: int, end: int) -> None:
        """Take [start, end) out of automatic use for the rest of the run."""
        if (start, end) in self._taken:
            return
        self._taken.add((start, end))
        first = bisect_left(self.free, start, key=itemgetter(1))
        last = bisect_left(self.free, end, key=itemgetter(0))
        touched = self.free[first:last]
        sides = [(s, e) for low, high in touched for s, e in ((low, start), (end, high)) if s < e]
        self.free[first:last] = sides
        self.reserved += sum(e - s for s, e in touched) - sum(e - s for s, e in sides)

    def give(self, at: int, num_bytes: int) -> None:
        """Give a block back; neighbours merge."""
        self.used -= num_bytes
        insort(self.free, (at, at + num_bytes))
        merged: list[tuple[int, int]] = []
        for start, end in self.free:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self.free = merged
