"""Views of NkiTensor that reorder, repeat or regroup its dims, read it as another dtype, or spell
out an access pattern. None copies.

Source: nki.language.NkiTensor and its methods; NKI access patterns deep dive.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import dtypes
from .errors import broken, fail, unsupported
from .memory import HBM
from .outside import outside
from .rearrange import rearrange
from .view_rules import (
    BOUNDS,
    LAYOUT,
    MAX_DIMS,
    PARTITION,
    SHAPE,
    check_dim,
    infer_shape,
    reshape_strides,
    row_major,
)

if TYPE_CHECKING:
    from .tensor import NkiTensor

Slice = slice  # NkiTensor has a method of that name


class Views:
    """The part of NkiTensor that makes views."""

    __slots__ = ()

    dtype: dtypes.DType
    offset: int
    row: int
    shape: tuple[int, ...]
    space: int
    storage: Any
    strides: tuple[int, ...]

    def _made(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: dtypes.DType | None = None,
    ) -> Any:
        raise NotImplementedError

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> NkiTensor:
        if len(shape) > MAX_DIMS:
            fail(SHAPE, "NkiTensor", f"{len(shape)} dims", tensor=self, shape=shape)
        made: NkiTensor = self._made(shape, strides, offset)
        return made

    def permute(self, dims: tuple[int, ...]) -> NkiTensor:
        """Dims in another order."""
        dims = tuple(dims)
        if sorted(dims) != list(range(len(self.shape))):
            fail(SHAPE, "NkiTensor.permute", f"{dims} is no permutation", tensor=self)
        if self.space != HBM and dims[0] != 0:
            fail(PARTITION, "NkiTensor.permute", f"dims {dims}", tensor=self)
        return self._view(
            tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims), self.offset
        )

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a size-1 dim `size` times."""
        self._free_dim("broadcast", dim)
        if self.shape[dim] != 1 or size < 1:
            fail(
                SHAPE,
                "NkiTensor.broadcast",
                f"dim {dim} has size {self.shape[dim]}, not 1, or is repeated {size} times",
                tensor=self,
            )
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(tuple(shape), tuple(strides), self.offset)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a size-1 dim at `dim`."""
        self._free_dim("expand_dim", dim, len(self.shape) + 1)
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, strides[dim] * self.shape[dim] if dim < len(strides) else 1)
        return self._view(tuple(shape), tuple(strides), self.offset)

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a size-1 dim."""
        self._free_dim("squeeze_dim", dim)
        if self.shape[dim] != 1:
            fail(
                SHAPE,
                "NkiTensor.squeeze_dim",
                f"dim {dim} has size {self.shape[dim]}, not 1",
                tensor=self,
            )
        return self._view(
            self.shape[:dim] + self.shape[dim + 1 :],
            self.strides[:dim] + self.strides[dim + 1 :],
            self.offset,
        )

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> NkiTensor:
        """Split one dim; one entry of `shape` may be -1."""
        check_dim("reshape_dim", self, dim)
        sizes = infer_shape(tuple(shape), self.shape[dim])
        if sizes is None:
            fail(
                SHAPE,
                "NkiTensor.reshape_dim",
                f"{shape} does not split {self.shape[dim]}",
                tensor=self,
            )
        if len(sizes) > 1:
            self._free_dim("reshape_dim", dim)
        inner = tuple(s * self.strides[dim] for s in row_major(sizes))
        return self._view(
            self.shape[:dim] + sizes + self.shape[dim + 1 :],
            self.strides[:dim] + inner + self.strides[dim + 1 :],
            self.offset,
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge dims start_dim..end_dim (inclusive), which must be contiguous."""
        self._free_dim("flatten_dims", start_dim)
        check_dim("flatten_dims", self, end_dim)
        if end_dim < start_dim:
            fail(SHAPE, "NkiTensor.flatten_dims", f"dims {start_dim} to {end_dim}", tensor=self)
        part = Slice(start_dim, end_dim + 1)
        size = math.prod(self.shape[part])
        steps = reshape_strides(self.shape[part], self.strides[part], (size,))
        if steps is None:
            fail(
                LAYOUT,
                "NkiTensor.flatten_dims",
                f"dims {start_dim}..{end_dim}",
                tensor=self,
                strides=self.strides,
            )
        return self._view(
            (*self.shape[:start_dim], size, *self.shape[end_dim + 1 :]),
            (*self.strides[:start_dim], *steps, *self.strides[end_dim + 1 :]),
            self.offset,
        )

    def reshape(self, shape: tuple[int, ...]) -> NkiTensor:
        """Another shape over the same bytes; an on-chip dim 0 stays."""
        sizes = infer_shape(tuple(shape), math.prod(self.shape))
        if sizes is None:
            fail(SHAPE, "NkiTensor.reshape", f"to {shape}", tensor=self)
        if self.space == HBM:
            steps = reshape_strides(self.shape, self.strides, sizes)
        else:
            if sizes[0] != self.shape[0]:
                fail(PARTITION, "NkiTensor.reshape", f"to {shape}", tensor=self)
            inner = reshape_strides(self.shape[1:], self.strides[1:], sizes[1:])
            steps = None if inner is None else (self.strides[0], *inner)
        if steps is None:
            fail(LAYOUT, "NkiTensor.reshape", f"to {shape}", tensor=self, strides=self.strides)
        return self._view(sizes, steps, self.offset)

    def view(self, dtype: Any) -> NkiTensor:
        """The same bytes read as another dtype; the last dim is scaled."""
        new = dtypes.dtype_of(dtype)
        if new.kind == "p":
            unsupported(f"views as the packed type nki.language.{new}")
        old = self.dtype
        shape, strides, offset = list(self.shape), list(self.strides), self.offset
        if new.itemsize != old.itemsize:
            if strides[-1] != 1 and shape[-1] != 1:
                fail(LAYOUT, "NkiTensor.view", f"as {new}: the last dim is strided", tensor=self)
            numbers = [shape[-1], offset, *strides[:-1]]
            scaled = [n * old.itemsize / new.itemsize for n in numbers]
            if any(s != int(s) for s in scaled):
                fail(LAYOUT, "NkiTensor.view", f"as {new}: sizes do not divide", tensor=self)
            shape[-1], offset = int(scaled[0]), int(scaled[1])
            strides = [int(s) for s in scaled[2:]] + [1]
        return self._made(tuple(shape), tuple(strides), offset, new)

    reinterpret_cast = view

    def ap(
        self,
        pattern: Any,
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: Any = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """Explicit [[stride, count], ...] over the storage, `offset` elements from this view."""
        dynamic = scalar_offset is not None or vector_offset is not None
        new = self.dtype if dtype is None else dtypes.dtype_of(dtype)
        base = self.offset * self.dtype.itemsize // new.itemsize + (offset or 0)
        shape = tuple([int(count) for _, count in pattern])
        strides = tuple([int(stride) for stride, _ in pattern])
        made = self._made(shape, strides, base, new)
        if self.space != HBM and shape[0] > 1 and strides[0] != made.row:
            detail = f"the first stride is {strides[0]}, one partition is {made.row} elements"
            broken(PARTITION, "NkiTensor.ap", detail, tensor=self)
            strides = (made.row, *strides[1:])  # tolerated: engines can step by nothing else
            made = self._made(shape, strides, base, new)
        skip = 0 if vector_offset is None else 1  # each row has an address of its own
        last = base
        for count, stride in zip(shape[skip:], strides[skip:], strict=True):
            if stride > 0:
                last += (count - 1) * stride
        total = self.storage.partitions * made.row
        if len(shape) > MAX_DIMS or min(shape) < 1:
            fail(SHAPE, "NkiTensor.ap", f"pattern {pattern}", tensor=self)
        if not 0 <= base <= last < total:
            detail = f"pattern {pattern} from {base} ends at {last} of {total}"
            if dynamic:
                fail(BOUNDS, "NkiTensor.ap", detail, tensor=self)
            return outside(made, "NkiTensor.ap", detail)
        if dynamic:
            from .dynamic import indirect_view  # built on this module

            return indirect_view(
                self, shape, strides, base, scalar_offset, vector_offset, indirect_dim, new
            )
        return made

    def rearrange(
        self, src_pattern: Any, dst_pattern: Any, fixed_sizes: dict[str, int] | None = None
    ) -> NkiTensor:
        """einops-style split, reorder and merge by named dims."""
        return rearrange(self, src_pattern, dst_pattern, fixed_sizes or {})

    def _free_dim(self, method: str, dim: int, end: int | None = None) -> None:
        check_dim(method, self, dim, end)
        if self.space != HBM and dim == 0:
            fail(PARTITION, f"NkiTensor.{method}", "dim 0 of an on-chip tensor", tensor=self)
