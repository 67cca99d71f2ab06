"""Which bytes of an allocation have been written, and by whom.

Most tiles are written whole, so the state is one small integer. Tiles written in a few dense
pieces keep a dict of disjoint rectangles; anything else falls back to one byte per granule.
Codes say who wrote: the PSUM accumulation rules need to know. Does not hold data.

A `pattern` is (first partition, byte, counts, byte strides, item size), partitions first.
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


def overlap(a: Rect, b: Rect) -> int:
    """Bytes that two rectangles share."""
    height = min(a[1], b[1]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[2], b[2])
    return height * width if height > 0 and width > 0 else 0


Pattern = tuple[int, int, tuple[int, ...], tuple[int, ...], int]
CODES = (FRESH, MATMUL, OTHER, ZEROED)


class InitMap:
    """Write state of `partitions` x `row_bytes`; `uniform` is a code, or MIXED.

    `granule` is the bytes per cell to begin with; a finer access refines the cells. A map of
    a whole memory (`collapse=False`) is never searched for having become uniform.
    """

    __slots__ = ("area", "cells", "collapse", "granule", "rects", "uniform", "whole")

    def __init__(
        self, partitions: int, row_bytes: int, granule: int, *, collapse: bool = True
    ) -> None:
        self.uniform = FRESH
        self.whole: Rect = (0, partitions, 0, row_bytes)
        self.rects: dict[Rect, int] | None = None
        self.area = 0
        self.cells: Any = None  # uint8 [partitions, row_bytes // granule] once rects do not do
        self.granule = granule
        self.collapse = collapse

    def mark(self, rect: Rect, dense: bool, pattern: Pattern, code: int) -> None:
        """Record a write by `code` (FRESH to forget one)."""
        if self.uniform == code:
            return
        if dense and rect == self.whole:
            self.uniform, self.rects, self.cells = code, None, None
            return
        if self.uniform >= 0:
            self._split()
        if self.cells is None and dense and self._mark_rect(rect, code):
            return
        self.cell_view(pattern)[...] = code
        if self.collapse and (self.cells == code).all():
            self.uniform, self.cells = code, None

    def mark_where(self, pattern: Pattern, chosen: Any, code: int) -> None:
        """Record a write to the items of a region that the boolean array `chosen` selects."""
        if self.uniform >= 0:
            self._split()
        self.cell_view(pattern)[chosen] = code
        if self.collapse and (self.cells == code).all():
            self.uniform, self.cells = code, None

    def codes(self, rect: Rect, dense: bool, pattern: Pattern) -> set[int]:
        """The codes found in a region (FRESH among them if any byte was never written)."""
        if self.uniform >= 0:
            return {self.uniform}
        if self.cells is None:
            rects = self.rects or {}
            if rect in rects:
                return {rects[rect]}
            found = {code for other, code in rects.items() if overlap(rect, other)}
            covered = sum(overlap(rect, other) for other in rects)
            if covered == _area(rect):
                return found
            if dense:
                return found | {FRESH}
        cells = self.cell_view(pattern)
        return {code for code in CODES if (cells == code).any()}

    def _split(self) -> None:
        first = self.uniform
        self.rects = {} if first == FRESH else {self.whole: first}
        self.area = 0 if first == FRESH else _area(self.whole)
        self.uniform, self.cells = MIXED, None

    def _mark_rect(self, rect: Rect, code: int) -> bool:
        """Keep a dense write as a rectangle, if it is disjoint from the others."""
        rects = self.rects
        assert rects is not None, "a mixed map without cells has rects"
        if rect not in rects:
            if len(rects) >= MAX_RECTS or any(overlap(rect, other) for other in rects):
                return False
            self.area += _area(rect)
        rects[rect] = code
        if self.area == _area(self.whole) and all(c == code for c in rects.values()):
            self.uniform, self.rects = code, None
        return True

    def cell_view(self, pattern: Pattern) -> Any:
        """The codes of a region as a view; items of several cells get a last dim of cells."""
        partition, byte, counts, strides, item = pattern
        self._make_cells(min(item, byte & -byte or item))
        granule, width = self.granule, self.cells.shape[1]
        at = partition * width + byte // granule
        steps = [width * strides[0], *(s // granule for s in strides[1:])]
        if item > granule:
            counts, steps = (*counts, item // granule), [*steps, 1]
        return np.ndarray(counts, np.uint8, self.cells, at, steps)

    def _make_cells(self, item: int) -> None:
        _, partitions, _, row_bytes = self.whole
        if self.cells is None:
            self.granule = min(self.granule, item)
            width = -(-row_bytes // self.granule)
            self.cells = np.zeros((partitions, width), np.uint8)
            if self.uniform > FRESH:
                self.cells[...] = self.uniform
            rects = self.rects or {}
            if any(b % self.granule for rect in rects for b in rect[2:]):
                self.granule, self.cells = 1, np.repeat(self.cells, self.granule, axis=1)
            for (p0, p1, b0, b1), code in rects.items():
                self.cells[p0:p1, b0 // self.granule : b1 // self.granule] = code
            self.rects, self.uniform = None, MIXED
        elif item < self.granule:
            self.cells = np.repeat(self.cells, self.granule // item, axis=1)
            self.granule = item
