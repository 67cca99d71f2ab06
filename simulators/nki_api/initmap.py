"""Which bytes of an allocation have been written, and by whom.

Most tiles are written whole, so the state is one small integer; else a grid of codes. Codes say who
wrote: the PSUM accumulation rules need to know. Does not hold data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .region import Grid, Rect, Region

FRESH = 0  # never written
MATMUL = 1  # last written by TensorE
OTHER = 2  # last written by another engine or a DMA
ZEROED = 3  # last written by a memset of zero
MIXED = -1
MOST_LATER = 4096
CODES = (FRESH, MATMUL, OTHER, ZEROED)


class InitMap:
    """Write state of `partitions` x `row_bytes`; `uniform` is a code, or MIXED.

    A map of a whole memory (`collapse=False`) is never searched for having become uniform.
    """

    __slots__ = ("area", "collapse", "grid", "later", "marked", "uniform", "whole")

    def __init__(self, partitions: int, row_bytes: int, *, collapse: bool = True) -> None:
        self.uniform = FRESH if collapse else MIXED
        self.whole: Rect = (0, partitions, 0, row_bytes)
        self.area = partitions * row_bytes
        self.grid: Grid | None = None
        self.marked: Any = None  # with a grid, by code: at most so many bytes have it
        self.collapse = collapse
        self.later: Any = None if collapse else []  # writes that are not in the grid yet

    def mark(self, region: Region, code: int) -> None:
        """Record a write by `code` (FRESH to forget one)."""
        if self.uniform == code:
            return
        if region.dense and region.rect == self.whole:
            self.uniform, self.grid = code, None
            return
        self._split().at(region)[...] = code
        self._collapse(region, code)

    def mark_later(self, region: Region, origin: tuple[int, int], code: int) -> None:
        """mark(), of a region counted from `origin`, when something is asked of this map."""
        self.later.append((region, origin, code))
        if len(self.later) > MOST_LATER:
            self._split()

    def mark_where(self, region: Region, chosen: Any, code: int) -> None:
        """Record a write to the items of a region that the boolean array `chosen` selects."""
        self._split().items(region)[chosen] = code
        self._collapse(region, code)

    def codes(self, region: Region) -> set[int]:
        """The codes found in a region (FRESH among them if any byte was never written)."""
        if self.uniform >= 0:
            return {self.uniform}
        cells = self._split().at(region)
        low, high = int(cells.min()), int(cells.max())
        if high - low < 2:
            return {low, high}
        return {code for code in CODES if (cells == code).any()}

    def fresh(self, region: Region) -> bool:
        """Whether any byte of a region was never written."""
        if self.uniform >= 0:
            return self.uniform == FRESH
        return not self._split().at(region).all()

    def written(self, region: Region) -> Any:
        """Which items of a region have been written, as booleans; a last dim of an item's cells."""
        return self._split().items(region) != FRESH

    def _split(self) -> Grid:
        if self.later:
            waiting, self.later = self.later, []
            for region, origin, code in waiting:
                self.mark(region.moved(*origin), code)
        if self.grid is None:
            _, partitions, _, row_bytes = self.whole
            self.grid = Grid(partitions, row_bytes, np.uint8, max(self.uniform, FRESH))
            self.marked = [0] * len(CODES)
            self.marked[self.uniform] = self.area
            self.uniform = MIXED
        return self.grid

    def _collapse(self, region: Region, code: int) -> None:
        """Notice that every byte has become `code`; counted first, so searched for rarely."""
        self.marked[code] += region.area
        if not self.collapse or self.marked[code] < self.area:
            return
        cells = self._split().cells
        same = np.count_nonzero(cells == code)
        self.marked[code] = same * self._split().granule
        if same == cells.size:
            self.uniform, self.grid = code, None
