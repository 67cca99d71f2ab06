"""Indexing of NkiTensor: t[...], slice, select, and assignment to elements.

Bounds are checked when a view is made. Indices known at run time: dynamic.py.

Source: nki.language.NkiTensor (__getitem__, slice, select, vector_select), nki.language.ds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import fail, unsupported
from .memory import HBM
from .view_rules import BOUNDS, check_dim

if TYPE_CHECKING:
    from .tensor import NkiTensor

Slice = slice  # NkiTensor has a method of that name


class DynamicSlice:
    """nl.ds(start, size)."""

    __slots__ = ("size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


class Indexing:
    """The part of NkiTensor that indexes."""

    __slots__ = ()

    offset: int
    shape: tuple[int, ...]
    space: int
    storage: Any
    strides: tuple[int, ...]

    def __getitem__(self, key: Any) -> NkiTensor:
        keys = key if type(key) is tuple else (key,)
        if len(keys) > len(self.shape):
            if any(k is Ellipsis for k in keys):
                return self[_expand_ellipsis(keys, len(self.shape))]
            fail(
                BOUNDS,
                "NkiTensor[...]",
                f"{len(keys)} indices for {len(self.shape)} dims",
                tensor=self,
            )
        old_shape, old_strides = self.shape, self.strides
        shape, strides, offset = [], [], self.offset
        for dim, k in enumerate(keys):
            count, stride = old_shape[dim], old_strides[dim]
            if type(k) is Slice:
                if k.step is None:  # most slices are of this kind
                    first = 0 if k.start is None else k.start
                    last = count if k.stop is None else k.stop
                    if 0 <= first < last <= count:
                        offset += first * stride
                        shape.append(last - first)
                        strides.append(stride)
                        continue
                start, size, step = self._slice(dim, k, count)
                offset += start * stride
                shape.append(size)
                strides.append(stride * step)
            elif type(k) is DynamicSlice:
                if not 0 <= k.start <= k.start + k.size <= count or k.size < (self.space != HBM):
                    self._out_of_bounds(dim, f"ds({k.start}, {k.size})")
                offset += k.start * stride
                shape.append(k.size)
                strides.append(stride)
            elif k is Ellipsis:
                return self[_expand_ellipsis(keys, len(self.shape))]
            else:
                index = self._index(dim, k, count)
                offset += index * stride
                if dim == 0 and self.space != HBM:
                    shape.append(1)
                    strides.append(stride)
        shape.extend(old_shape[len(keys) :])
        strides.extend(old_strides[len(keys) :])
        least = 1 if self.space == HBM else 2
        while len(shape) < least:
            shape.append(1)
            strides.append(1)
        return self._made(tuple(shape), tuple(strides), offset)

    def _slice(self, dim: int, k: Slice, count: int) -> tuple[int, int, int]:
        start = 0 if k.start is None else k.start
        stop = count if k.stop is None else k.stop
        step = 1 if k.step is None else k.step
        if start < 0:
            start += count
        if stop < 0:
            stop += count
        least = 0 if self.space == HBM else 1  # a core's share in HBM may be empty, a tile not
        if not 0 <= start <= stop - least <= stop <= count or step < 1:
            self._out_of_bounds(dim, f"{k.start}:{k.stop}:{k.step}")
        return start, stop - start if step == 1 else -(-(stop - start) // step), step

    def _index(self, dim: int, k: Any, count: int) -> int:
        if isinstance(k, Indexing):
            unsupported("indexing by a tensor (dynamic select)")
        try:
            index = None if isinstance(k, (bool, np.bool_)) else k.__index__()
        except (AttributeError, TypeError):
            index = None
        if index is None:
            raise TypeError(f"expected an int, slice, nl.ds or ... as index, got {k!r}")
        if not -count <= index < count:
            self._out_of_bounds(dim, str(index))
        return int(index + count if index < 0 else index)

    def _out_of_bounds(self, dim: int, what: str) -> None:
        fail(
            BOUNDS,
            "NkiTensor[...]",
            f"index {what} of dim {dim} is outside 0:{self.shape[dim]} or empty",
            tensor=self,
        )

    def _made(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
        raise NotImplementedError

    def __setitem__(self, key: Any, value: Any) -> None:
        """A copy into the view, or a fill with a number; which engine is not documented."""
        from .functions.movement import assign  # functions are built on this module

        assign(self if key is Ellipsis else self[key], value)

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """The view [start:end:step] of one dim; start and end count from the front."""
        check_dim("slice", self, dim)
        if not 0 <= start < end:
            self._out_of_bounds(dim, f"{start}:{end}:{step}")
        keys: list[Any] = [Slice(None)] * len(self.shape)
        keys[dim] = Slice(start, end, step)
        return self[tuple(keys)]

    def select(self, dim: int, index: Any) -> NkiTensor:
        """One element of a dim, which goes away (an on-chip dim 0 stays, with size 1)."""
        check_dim("select", self, dim)
        if not hasattr(index, "__index__") or hasattr(index, "unknown"):
            from .dynamic import indirect_view  # built on this module

            shape, strides = list(self.shape), list(self.strides)
            del shape[dim], strides[dim]
            return indirect_view(self, tuple(shape), tuple(strides), self.offset, index, None, dim)
        keys: list[Any] = [Slice(None)] * len(self.shape)
        keys[dim] = index
        if index < 0:
            self._out_of_bounds(dim, str(index))
        return self[tuple(keys)]

    def vector_select(self, dim: int, vector_offset: Any) -> NkiTensor:
        """Row p of the view is self[vector_offset[p]]; for a DMA, on HBM, dim 0."""
        from .dynamic import indirect_view  # built on this module

        count = getattr(vector_offset, "shape", (0,))[0]
        shape = (count, *self.shape[1:])
        return indirect_view(self, shape, self.strides, self.offset, None, vector_offset, dim)


def _expand_ellipsis(keys: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    at, *more = [i for i, k in enumerate(keys) if k is Ellipsis]
    if more:
        raise TypeError("expected one ... in an index, got several")
    return (*keys[:at], *[Slice(None)] * (ndim - len(keys) + 1), *keys[at + 1 :])
