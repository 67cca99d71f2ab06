"""Where there is room: free intervals of a memory, and rectangles of placed tensors.

Knows bytes only, neither tensors nor rules.
"""

from __future__ import annotations

from bisect import insort

from .initmap import Rect, overlap


class FreeList:
    """First-fit free intervals of [0, size); blocks of at most `block` bytes never cross one."""

    def __init__(self, size: int, block: int = 0) -> None:
        self.size = size
        self.block = block
        self.free: list[tuple[int, int]] = [(0, size)]
        self.used = 0
        self.peak = 0
        self.reserved = 0

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

    def reserve(self, start: int, end: int) -> None:
        """Take [start, end) out of automatic use for the rest of the run."""
        pieces = [
            (s, e)
            for low, high in self.free
            for s, e in ((low, min(high, start)), (max(low, end), high))
            if s < e
        ]
        before = sum(e - s for s, e in self.free)
        self.free = sorted(set(pieces))
        self.reserved += before - sum(e - s for s, e in self.free)

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


class Neighbours:
    """Rectangles of live placed tensors, found by the blocks of bytes that they touch."""

    BLOCK = 2048

    def __init__(self) -> None:
        self.rects: dict[int, Rect] = {}
        self.blocks: dict[int, dict[int, Rect]] = {}

    def _touched(self, rect: Rect) -> range:
        return range(rect[2] // self.BLOCK, -(-rect[3] // self.BLOCK))

    def overlaps(self, rect: Rect) -> bool:
        """Whether any rectangle shares a byte with `rect`."""
        empty: dict[int, Rect] = {}
        return any(
            overlap(rect, other)
            for block in self._touched(rect)
            for other in self.blocks.get(block, empty).values()
        )

    def add(self, number: int, rect: Rect) -> None:
        """Enter the rectangle of tensor `number`."""
        self.rects[number] = rect
        for block in self._touched(rect):
            self.blocks.setdefault(block, {})[number] = rect

    def remove(self, number: int) -> None:
        """Forget a tensor; one that was never entered is ignored."""
        rect = self.rects.pop(number, None)
        for block in self._touched(rect) if rect is not None else ():
            del self.blocks[block][number]
