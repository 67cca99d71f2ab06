"""Which bytes a view covers, and arrays that hold something for every few of them.

A Grid has one cell for `granule` bytes of a partition: as coarse as the accesses seen so far allow,
so that marking a tile costs next to nothing. Knows neither tensors nor what its cells mean.

A pattern is (first partition, byte, counts, byte strides, item size), partitions first; a rect is
(first partition, end partition, first byte, end byte).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

COARSE = 64  # bytes per cell of a grid that has seen no finer access

Pattern = tuple[int, int, tuple[int, ...], tuple[int, ...], int]
Rect = tuple[int, int, int, int]


def overlap(a: Rect, b: Rect) -> int:
    """Bytes that two rectangles share."""
    height = min(a[1], b[1]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[2], b[2])
    return height * width if height > 0 and width > 0 else 0


class Region:
    """The bytes of a strided view.

    rect: its bounds. dense: it covers them wholly. area: bytes, counting each visit. repeats: it
    surely visits some bytes more than once.
    grain: every boundary of the region is a multiple of so many bytes.
    """

    __slots__ = ("area", "dense", "grain", "pattern", "rect", "repeats", "runs")

    def __init__(self, pattern: Pattern) -> None:
        first, byte, counts, strides, item = pattern
        self.pattern = pattern
        span = num = item
        for count, stride in zip(counts[1:], strides[1:], strict=True):
            span += (count - 1) * stride
            num *= count
        rows = counts[0] if strides[0] else 1
        self.rect = (first, first + rows, byte, byte + span)
        self.dense = num == span
        self.repeats = num > span
        self.area = rows * num
        self.runs: Any = None
        if self.dense:
            self.grain = math.gcd(byte, span)
            return
        run, outer = item, len(counts) - 1
        while outer and (counts[outer] == 1 or strides[outer] == run):
            run *= counts[outer]
            outer -= 1
        self.runs = counts[1 : outer + 1], strides[1 : outer + 1], run
        self.grain = math.gcd(byte, run, *self.runs[1])

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def whole(partitions: int, num_bytes: int) -> Region:
        """All bytes of a memory of this size."""
        return Region((0, 0, (partitions, num_bytes), (1, 1), 1))

    def moved_rect(self, partitions: int, num_bytes: int) -> Rect:
        """The bounds so many partitions and bytes further on."""
        first, last, start, end = self.rect
        return first + partitions, last + partitions, start + num_bytes, end + num_bytes

    def moved(self, partitions: int, num_bytes: int) -> Region:
        """The same view so many partitions and bytes further on."""
        first, byte, counts, strides, item = self.pattern
        return Region((first + partitions, byte + num_bytes, counts, strides, item))


class Grid:
    """Cells of one NumPy type over `partitions` x `num_bytes`, all `value` to begin with."""

    __slots__ = ("cells", "granule", "num_bytes")

    def __init__(self, partitions: int, num_bytes: int, dtype: Any, value: int = 0) -> None:
        self.num_bytes = num_bytes
        self.granule = math.gcd(COARSE, num_bytes)
        self.cells: Any = np.full((partitions, num_bytes // self.granule), value, dtype)

    def _refine(self, grain: int) -> None:
        finer = math.gcd(self.granule, grain)
        self.cells = np.repeat(self.cells, self.granule // finer, axis=1)
        self.granule = finer

    def at(self, region: Region) -> Any:
        """The cells of a region, as a view; the order of its dims is of no meaning."""
        if region.grain % self.granule:
            self._refine(region.grain)
        granule, cells = self.granule, self.cells
        first, last, start, end = region.rect
        if region.dense:
            return cells[first:last, start // granule : end // granule]
        counts, strides, run = region.runs
        width, unit = cells.strides
        steps = (width, *(s // granule * unit for s in strides), unit)
        at = first * width + start // granule * unit
        return np.ndarray((last - first, *counts, run // granule), cells.dtype, cells, at, steps)

    def items(self, region: Region) -> Any:
        """The cells in the shape of the region's pattern; items of several cells get a last dim."""
        first, byte, counts, strides, item = region.pattern
        if math.gcd(byte, item) % self.granule:
            self._refine(math.gcd(byte, item))
        granule, cells = self.granule, self.cells
        width, unit = cells.strides
        steps = [width * strides[0], *(s // granule * unit for s in strides[1:])]
        if item > granule:
            counts, steps = (*counts, item // granule), [*steps, unit]
        at = first * width + byte // granule * unit
        return np.ndarray(counts, cells.dtype, cells, at, steps)
