"""Writes an instruction log by hand: shapes only, no data, a few lines per kernel.

Does: allocate tiles, slice them and append instructions to a Log, so that a kernel known from its
published description can be timed. Does not: check any rule of the language (nki_api does).

Letters: P partitions, F free elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nxd_cp.simulators.nki_api.log import (
    ACCUMULATE,
    ONEZERO,
    READ_ACCUMULATOR,
    SKIPPED,
    TRANSPOSE,
    BufferInfo,
    Log,
)
from nxd_cp.simulators.timing.access import itemsize


@dataclass(frozen=True)
class Tile:
    """A view with the fields that a Log reads; `tile[a:b, c:d]` slices it."""

    storage: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    space: str

    def __getitem__(self, index: Any) -> Tile:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        offset, shape = self.offset, []
        for item, count, stride in zip(index, self.shape, self.strides, strict=True):
            if isinstance(item, int):
                item = slice(item, item + 1)
            start, stop, _ = item.indices(count)
            offset += start * stride
            shape.append(stop - start)
        return Tile(self.storage, offset, tuple(shape), self.strides, self.dtype, self.space)

    def swapped(self) -> Tile:
        """The same elements with the first two dims changed over."""
        shape, strides = list(self.shape), list(self.strides)
        shape[:2], strides[:2] = shape[1::-1], strides[1::-1]
        return Tile(self.storage, self.offset, tuple(shape), tuple(strides), self.dtype, self.space)

    @property
    def free(self) -> int:
        """Elements per partition."""
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count


class Stream:
    """A Log under construction. Every method appends one instruction.

    elements: per engine, of all instructions so far.
    """

    def __init__(self) -> None:
        self.log = Log()
        self.elements = {"vector": 0, "scalar": 0}

    def _tile(self, space: str, shape: tuple[int, ...], dtype: str) -> Tile:
        strides, step = [], 1
        for count in reversed(shape):
            strides.append(step)
            step *= count
        item = itemsize(dtype)
        row = step // shape[0] * item if space != "hbm" else step * item
        partitions = shape[0] if space != "hbm" else 1
        number = len(self.log.buffers)
        self.log.buffers.append(BufferInfo(space, "", dtype, partitions, row, 0, 0))
        return Tile(
            SimpleNamespace(number=number), 0, shape, tuple(reversed(strides)), dtype, space
        )

    def _add(
        self,
        opcode: str,
        engine: str,
        dst: Tile | None,
        sources: tuple[Tile, ...],
        elements: int,
        flags: int = 0,
        detail: str = "",
    ) -> None:
        """Append a record whose source line is that of the caller of the method that calls this."""
        self.log.add(opcode, engine, dst, sources, elements, flags, depth=3, detail=detail)

    def hbm(self, *shape: int, dtype: str = "bfloat16") -> Tile:
        """A tensor in HBM."""
        return self._tile("hbm", shape, dtype)

    def sbuf(self, *shape: int, dtype: str = "bfloat16") -> Tile:
        """A tile in SBUF, partitions first."""
        return self._tile("sbuf", shape, dtype)

    def psum(self, *shape: int, dtype: str = "float32") -> Tile:
        """A tile in PSUM, partitions first."""
        return self._tile("psum", shape, dtype)

    def dma(self, dst: Tile, src: Tile, mode: str = "unknown", *, skipped: bool = False) -> None:
        """One DMA; a skipped one has an index out of bounds and moves nothing."""
        flags = SKIPPED if skipped else 0
        self._add("dma_copy", "dma", dst, (src,), dst.free, flags, detail=mode)

    def load(self, src: Tile, dtype: str | None = None, queue: str = "") -> Tile:
        """A fresh SBUF tile with the contents of `src`; on a DMA queue of its own if named."""
        tile = self.sbuf(*src.shape, dtype=dtype or src.dtype)
        mode = f"unknown:{queue}" if queue else "unknown"
        self._add("dma_copy", "dma", tile, (src,), tile.free, detail=mode)
        return tile

    def dma_transpose(self, dst: Tile, src: Tile) -> None:
        """One DMA in transpose mode."""
        self._add("dma_transpose", "dma", dst, (src,), dst.free, TRANSPOSE, detail="unknown")

    def matmul(
        self, dst: Tile, stationary: Tile, moving: Tile, *, add: bool = False, onezero: bool = False
    ) -> None:
        """dst (+)= stationary.T @ moving; onezero: one of them is said to hold ones and zeros."""
        flags = (ACCUMULATE if add else 0) | (ONEZERO if onezero else 0)
        self._add("nc_matmul", "tensor", dst, (stationary, moving), moving.free, flags)

    def transpose(self, dst: Tile, data: Tile) -> None:
        """A transpose on TensorE; its moving operand is as wide as data has partitions."""
        self._add("nc_transpose", "tensor", dst, (data,), data.shape[0])

    def vector(self, opcode: str, dst: Tile, *sources: Tile, read: bool = False) -> None:
        """An instruction on VectorE; with `read` the last source takes the reduce result."""
        size = max([dst.free, *(s.free for s in sources)])
        self.elements["vector"] += size
        self._add(opcode, "vector", dst, sources, size, READ_ACCUMULATOR if read else 0)

    def scalar(self, function: str, dst: Tile, *sources: Tile, read: bool = False) -> None:
        """An activation on ScalarE; with `read` the last source takes the row sums."""
        size = max([dst.free, *(s.free for s in sources)])
        self.elements["scalar"] += size
        self._add(
            "activation",
            "scalar",
            dst,
            sources,
            size,
            READ_ACCUMULATOR if read else 0,
            detail=function,
        )

    def gpsimd(self, opcode: str, dst: Tile, *sources: Tile) -> None:
        """An instruction on GpSimdE."""
        self._add(opcode, "gpsimd", dst, sources, dst.free)

    def loop_iteration(self) -> None:
        """The start of one iteration of a device loop: all engines meet."""
        self._add("loop_iteration", "all", None, (), 0)
