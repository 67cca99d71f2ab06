"""Which bytes of an allocation have been written, and by whom.

Most tiles are written whole, so the state is one small integer. Tiles written in a few dense
pieces keep a dict of disjoint rectangles; anything else falls back to one byte per granule.
Codes say who wrote: the PSUM accumulation rules need to know. Does not hold data.

Letters: rect = (first partition, end partition, first byte, end byte) within the allocation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FRESH = 0  # never written
MATMUL = 1  # last written by TensorE
OTHER = 2  # last written by another engine or a DMA
ZEROED = 3  # last written by a memset of zero
MIXED = -1
MAX_RECTS = 64

Rect = tuple[int, int, int, int]


def _area(rect: Rect) -> int:
    return (rect[1] - rect[0]) * (rect[3] - rect[2])


def _common(a: Rect, b: Rect) -> int:
    height = min(a[1], b[1]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[2], b[2])
    return height * width if height > 0 and width > 0 else 0


class InitMap:
    """Write state of `partitions` x `row_bytes`; `uniform` is a code, or MIXED."""

    __slots__ = ("uniform", "whole", "rects", "area", "cells", "granule")

    def __init__(self, partitions: int, row_bytes: int, granule: int, code: int = FRESH) -> None:
        self.uniform = code
        self.whole: Rect = (0, partitions, 0, row_bytes)
        self.rects: dict[Rect, int] | None = None
        self.area = 0
        self.cells: Any = None  # uint8 [partitions, row_bytes // granule] once rects do not do
        self.granule = granule

    def mark(self, rect: Rect, dense: bool, pattern: tuple[Any, ...], code: int) -> None:
        """Record a write; `pattern` is (byte offset, counts, byte strides) for the cell map."""
        if self.uniform == code:
            return
        if dense and rect == self.whole:
            self.uniform, self.rects, self.cells = code, None, None
            return
        if self.uniform >= 0:
            self._split()
        if self.cells is None and dense and self._mark_rect(rect, code):
            return
        cells = self.cell_view(pattern)
        cells[...] = code
        self._collapse(code)

    def codes(self, rect: Rect, dense: bool, pattern: tuple[Any, ...]) -> set[int]:
        """The codes found in a region (FRESH among them if any byte was never written)."""
        if self.uniform >= 0:
            return {self.uniform}
        if self.cells is None:
            rects = self.rects or {}
            if rect in rects:
                return {rects[rect]}
            found = {code for other, code in rects.items() if _common(rect, other)}
            covered = sum(_common(rect, other) for other in rects)
            if covered == _area(rect):
                return found
            if dense:
                return found | {FRESH}
        return {int(c) for c in np.unique(self.cell_view(pattern))}

    def _split(self) -> None:
        first = self.uniform
        self.rects = {} if first == FRESH else {self.whole: first}
        self.area = 0 if first == FRESH else _area(self.whole)
        self.uniform, self.cells = MIXED, None

    def _mark_rect(self, rect: Rect, code: int) -> bool:
        rects = self.rects
        assert rects is not None, "a mixed map without cells has rects"
        if rect not in rects:
            if len(rects) >= MAX_RECTS or any(_common(rect, other) for other in rects):
                return False
            self.area += _area(rect)
        rects[rect] = code
        if self.area == _area(self.whole) and all(c == code for c in rects.values()):
            self.uniform, self.rects = code, None
        return True

    def cell_view(self, pattern: tuple[Any, ...]) -> Any:
        """The write codes of a region, one per granule (a view, not a copy)."""
        if self.cells is None:
            _, partitions, _, row_bytes = self.whole
            width = -(-row_bytes // self.granule)
            self.cells = np.zeros((partitions, width), dtype=np.uint8)
            for (p0, p1, b0, b1), code in (self.rects or {}).items():
                self.cells[p0:p1, b0 // self.granule : -(-b1 // self.granule)] = code
            self.rects = None
        offset, counts, strides = pattern
        granule = self.granule
        width = self.cells.shape[1]
        first, rest = divmod(offset, self.whole[3])
        flat = first * width + rest // granule
        steps = [width * strides[0]] + [s // granule for s in strides[1:]]
        return np.ndarray(counts, np.uint8, self.cells, flat, steps)

    def _collapse(self, code: int) -> None:
        if (self.cells == code).all():
            self.uniform, self.cells = code, None
