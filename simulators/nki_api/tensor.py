"""NkiTensor: a strided view (shape, strides, offset, dtype) of an allocation.

Views never copy. Strides and offset are in elements; on chip, dim 0 is the partition dim and a
step of one partition is `row` elements. Bounds are checked when a view is made.
Does not know instructions; indirect views are not implemented yet.

Source: nki.language.NkiTensor and its methods.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import dtypes
from .errors import fail, unsupported
from .initmap import Pattern
from .memory import HBM, MemoryRegion, Storage
from .rearrange import rearrange
from .rules import documented

_BOUNDS = documented(
    "view.bounds",
    "nki.language.NkiTensor",
    "an index or slice lies inside the tensor and is not empty",
)
_SHAPE = documented(
    "view.shape",
    "nki.language.NkiTensor",
    "a view has at most 5 dims and covers what it is a view of",
)
_LAYOUT = documented(
    "view.layout",
    "nki.language.NkiTensor",
    "the memory layout allows the requested view without a copy",
)
_PARTITION = documented(
    "view.partition_dim",
    "nki.language.NkiTensor",
    "dim 0 of an on-chip tensor stays the partition dim, in steps of one",
)
MAX_DIMS = 5


Slice = slice  # NkiTensor has a method of that name


class DynamicSlice:
    """nl.ds(start, size)."""

    __slots__ = ("size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor."""
    strides, step = [], 1
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


class NkiTensor:
    """A tensor in SBUF, PSUM or HBM; see the module for what its fields mean."""

    __slots__ = (
        "array_",
        "checked",
        "dense",
        "dtype",
        "offset",
        "rect_",
        "row",
        "shape",
        "space",
        "storage",
        "strides",
    )

    def __init__(
        self,
        storage: Storage,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: dtypes.DType,
    ) -> None:
        self.storage = storage
        self.space = storage.space
        self.shape = shape
        self.strides = strides
        self.offset = offset
        self.dtype = dtype
        self.row = storage.row_bytes // dtype.itemsize
        self.array_: Any = None
        self.rect_: Any = None
        self.dense = False
        self.checked = False  # operand rules already passed (checks.py)

    @property
    def buffer(self) -> MemoryRegion:
        """The memory region (nl.sbuf, nl.psum, ...)."""
        return self.storage.region

    @property
    def name(self) -> str:
        """The name given at allocation."""
        return self.storage.name

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """Shape, dtype and place, for messages."""
        text = f"{self.shape} {self.dtype} {self.storage.region.value}"
        if self.space != HBM:
            first = self.partition_start
            text += f" partitions {first}..{first + self.shape[0] - 1}"
        label = f" {self.name!r}" if self.name else ""
        return f"{text}{label}"

    __repr__ = describe

    def __bool__(self) -> bool:
        raise TypeError(
            "a tensor's values are not known while a kernel is built; "
            "Python control flow cannot depend on them"
        )

    def __iter__(self) -> Any:
        raise TypeError("an NkiTensor is not iterable; index it instead")

    @property
    def partition_start(self) -> int:
        """First partition of an on-chip view."""
        return self.storage.first_partition + self.offset // self.row

    @property
    def array(self) -> Any:
        """The NumPy view of the bytes, made once per tensor."""
        found = self.array_
        if found is None:
            storage, item = self.storage, self.dtype.itemsize
            if self.space == HBM:
                steps = tuple(s * item for s in self.strides)
                at = storage.base + self.offset * item
            else:
                partition, inner = divmod(self.offset, self.row)
                at = storage.base + partition * storage.pitch + inner * item
                steps = (
                    self.strides[0] // self.row * storage.pitch,
                    *(s * item for s in self.strides[1:]),
                )
            found = np.ndarray(self.shape, self.dtype.np_dtype, storage.data, at, steps)
            self.array_ = found
        return found

    @property
    def rect(self) -> Any:
        """(partition, end, byte, end) bounds in the storage's InitMap; sets `dense`."""
        found = self.rect_
        if found is None:
            storage, item = self.storage, self.dtype.itemsize
            if self.space == HBM:
                first, counts, strides, at = 0, self.shape, self.strides, self.offset
                last = 1
            else:
                first, at = divmod(self.offset, self.row)
                counts, strides = self.shape[1:], self.strides[1:]
                last = first + self.shape[0]
            span, num = 1, 1
            for count, stride in zip(counts, strides, strict=True):
                span += (count - 1) * stride
                num *= count
            partition, byte = storage.map_origin
            start = byte + at * item
            found = (partition + first, partition + last, start, start + span * item)
            self.rect_ = found
            self.dense = num == span
        return found

    @property
    def pattern(self) -> Pattern:
        """The access pattern in the storage's InitMap."""
        item = self.dtype.itemsize
        partition, byte = self.storage.map_origin
        if self.space == HBM:
            steps = (0, *(s * item for s in self.strides))
            return (0, self.offset * item, (1, *self.shape), steps, item)
        first, inner = divmod(self.offset, self.row)
        steps = (self.strides[0] // self.row, *(s * item for s in self.strides[1:]))
        return (partition + first, byte + inner * item, self.shape, steps, item)

    @property
    def own_place(self) -> tuple[Any, Pattern]:
        """`rect` and `pattern` counted from the storage's start (placed tensors)."""
        partition, byte = self.storage.map_origin
        first, last, start, end = self.rect
        at, inner, counts, steps, item = self.pattern
        rect = (first - partition, last - partition, start - byte, end - byte)
        return rect, (at - partition, inner - byte, counts, steps, item)

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> NkiTensor:
        if len(shape) > MAX_DIMS:
            fail(_SHAPE, "NkiTensor", f"{len(shape)} dims", tensor=self, shape=shape)
        return NkiTensor(self.storage, shape, strides, offset, self.dtype)

    def __getitem__(self, key: Any) -> NkiTensor:
        keys = key if type(key) is tuple else (key,)
        if Ellipsis in keys:
            keys = _expand_ellipsis(keys, len(self.shape))
        if len(keys) > len(self.shape):
            fail(
                _BOUNDS,
                "NkiTensor[...]",
                f"{len(keys)} indices for {len(self.shape)} dims",
                tensor=self,
            )
        shape, strides, offset = [], [], self.offset
        old_shape, old_strides = self.shape, self.strides
        for dim, k in enumerate(keys):
            count, stride = old_shape[dim], old_strides[dim]
            if type(k) is Slice:
                start, size, step = self._slice(dim, k, count)
                offset += start * stride
                shape.append(size)
                strides.append(stride * step)
            elif type(k) is DynamicSlice:
                if not 0 <= k.start <= k.start + k.size <= count or k.size < 1:
                    self._out_of_bounds(dim, f"ds({k.start}, {k.size})")
                offset += k.start * stride
                shape.append(k.size)
                strides.append(stride)
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
        return NkiTensor(self.storage, tuple(shape), tuple(strides), offset, self.dtype)

    def _slice(self, dim: int, k: Slice, count: int) -> tuple[int, int, int]:
        start = 0 if k.start is None else k.start
        stop = count if k.stop is None else k.stop
        step = 1 if k.step is None else k.step
        if start < 0:
            start += count
        if stop < 0:
            stop += count
        if not 0 <= start < stop <= count or step < 1:
            self._out_of_bounds(dim, f"{k.start}:{k.stop}:{k.step}")
        return start, -(-(stop - start) // step), step

    def _index(self, dim: int, k: Any, count: int) -> int:
        if isinstance(k, NkiTensor):
            unsupported("indexing by a tensor (dynamic select)")
        try:
            index = k.__index__()
        except AttributeError:
            raise TypeError(f"expected an int, slice, nl.ds or ... as index, got {k!r}") from None
        if not -count <= index < count:
            self._out_of_bounds(dim, str(index))
        return int(index + count if index < 0 else index)

    def _out_of_bounds(self, dim: int, what: str) -> None:
        fail(
            _BOUNDS,
            "NkiTensor[...]",
            f"index {what} of dim {dim} is outside 0:{self.shape[dim]} or empty",
            tensor=self,
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        """A copy into the view, or a fill with a number; which engine is not documented."""
        from .functions.movement import assign  # functions are built on this module

        assign(self if key is Ellipsis else self[key], value)

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """The view [start:end:step] of one dim."""
        keys: list[Any] = [Slice(None)] * len(self.shape)
        keys[dim] = Slice(start, end, step)
        return self[tuple(keys)]

    def select(self, dim: int, index: Any) -> NkiTensor:
        """One element of a dim, which goes away (an on-chip dim 0 stays, with size 1)."""
        if not hasattr(index, "__index__") or hasattr(index, "unknown"):
            from .dynamic import indirect_view  # built on this module

            shape, strides = list(self.shape), list(self.strides)
            del shape[dim], strides[dim]
            return indirect_view(self, tuple(shape), tuple(strides), self.offset, index, None, dim)
        keys: list[Any] = [Slice(None)] * len(self.shape)
        keys[dim] = index
        return self[tuple(keys)]

    def permute(self, dims: tuple[int, ...]) -> NkiTensor:
        """Dims in another order."""
        dims = tuple(dims)
        if sorted(dims) != list(range(len(self.shape))):
            fail(_SHAPE, "NkiTensor.permute", f"{dims} is no permutation", tensor=self)
        if self.space != HBM and dims[0] != 0:
            fail(_PARTITION, "NkiTensor.permute", f"dims {dims}", tensor=self)
        return self._view(
            tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims), self.offset
        )

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a size-1 dim `size` times."""
        self._free_dim("broadcast", dim)
        if self.shape[dim] != 1:
            fail(
                _SHAPE,
                "NkiTensor.broadcast",
                f"dim {dim} has size {self.shape[dim]}, not 1",
                tensor=self,
            )
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(tuple(shape), tuple(strides), self.offset)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a size-1 dim at `dim`."""
        self._free_dim("expand_dim", dim)
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, strides[dim] * self.shape[dim] if dim < len(strides) else 1)
        return self._view(tuple(shape), tuple(strides), self.offset)

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a size-1 dim."""
        self._free_dim("squeeze_dim", dim)
        if self.shape[dim] != 1:
            fail(
                _SHAPE,
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
        sizes = _infer(tuple(shape), self.shape[dim])
        if sizes is None:
            fail(
                _SHAPE,
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
        part = Slice(start_dim, end_dim + 1)
        size = math.prod(self.shape[part])
        steps = _reshape_strides(self.shape[part], self.strides[part], (size,))
        if steps is None:
            fail(
                _LAYOUT,
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
        sizes = _infer(tuple(shape), self.size)
        if sizes is None:
            fail(_SHAPE, "NkiTensor.reshape", f"to {shape}", tensor=self)
        if self.space == HBM:
            steps = _reshape_strides(self.shape, self.strides, sizes)
        else:
            if sizes[0] != self.shape[0]:
                fail(_PARTITION, "NkiTensor.reshape", f"to {shape}", tensor=self)
            inner = _reshape_strides(self.shape[1:], self.strides[1:], sizes[1:])
            steps = None if inner is None else (self.strides[0], *inner)
        if steps is None:
            fail(_LAYOUT, "NkiTensor.reshape", f"to {shape}", tensor=self, strides=self.strides)
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
                fail(_LAYOUT, "NkiTensor.view", f"as {new}: the last dim is strided", tensor=self)
            numbers = [shape[-1], offset, *strides[:-1]]
            scaled = [n * old.itemsize / new.itemsize for n in numbers]
            if any(s != int(s) for s in scaled):
                fail(_LAYOUT, "NkiTensor.view", f"as {new}: sizes do not divide", tensor=self)
            shape[-1], offset = int(scaled[0]), int(scaled[1])
            strides = [int(s) for s in scaled[2:]] + [1]
        return NkiTensor(self.storage, tuple(shape), tuple(strides), offset, new)

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
        if dynamic and dtype is not None:
            unsupported("NkiTensor.ap with a run-time offset and dtype=")
        new = self.dtype if dtype is None else dtypes.dtype_of(dtype)
        base = self.offset * self.dtype.itemsize // new.itemsize + (offset or 0)
        shape = tuple(int(count) for _, count in pattern)
        strides = tuple(int(stride) for stride, _ in pattern)
        made = NkiTensor(self.storage, shape, strides, base, new)
        skip = 0 if vector_offset is None else 1  # each row has an address of its own
        pairs = zip(shape[skip:], strides[skip:], strict=True)
        last = base + sum((c - 1) * s for c, s in pairs if s > 0)
        total = self.storage.partitions * made.row
        if len(shape) > MAX_DIMS or min(shape) < 1:
            fail(_SHAPE, "NkiTensor.ap", f"pattern {pattern}", tensor=self)
        if self.space != HBM and shape[0] > 1 and strides[0] != made.row:
            fail(
                _PARTITION,
                "NkiTensor.ap",
                f"the first stride is {strides[0]}, one partition is {made.row} elements",
                tensor=self,
            )
        if not 0 <= base <= last < total:
            fail(
                _BOUNDS,
                "NkiTensor.ap",
                f"pattern {pattern} from {base} ends at {last} of {total}",
                tensor=self,
            )
        if dynamic:
            from .dynamic import indirect_view  # built on this module

            return indirect_view(
                self, shape, strides, base, scalar_offset, vector_offset, indirect_dim
            )
        return made

    def rearrange(
        self, src_pattern: Any, dst_pattern: Any, fixed_sizes: dict[str, int] | None = None
    ) -> NkiTensor:
        """einops-style split, reorder and merge by named dims."""
        return rearrange(self, src_pattern, dst_pattern, fixed_sizes or {})

    def vector_select(self, dim: int, vector_offset: Any) -> NkiTensor:
        """Row p of the view is self[vector_offset[p]]; for a DMA, on HBM, dim 0."""
        from .dynamic import indirect_view  # built on this module

        count = getattr(vector_offset, "shape", (0,))[0]
        shape = (count, *self.shape[1:])
        return indirect_view(self, shape, self.strides, self.offset, None, vector_offset, dim)

    def indirect(self, index: Any, num_elem: int | None = None) -> NkiTensor:
        """Tensor indirection (gen4)."""
        unsupported("NkiTensor.indirect")

    def is_contiguous(self) -> bool:
        """Row-major without gaps (on chip: within each partition)."""
        skip = 0 if self.space == HBM else 1
        shape, strides = self.shape[skip:], self.strides[skip:]
        pairs = zip(shape, strides, row_major(shape), strict=True)
        return all(count == 1 or stride == dense for count, stride, dense in pairs)

    def is_indirect(self) -> bool:
        """Whether the view uses run-time addresses."""
        return False

    def get_pattern(self) -> list[list[int]]:
        """[[stride, count], ...]."""
        return [[s, c] for s, c in zip(self.strides, self.shape, strict=True)]

    def _free_dim(self, method: str, dim: int) -> None:
        if self.space != HBM and dim == 0:
            fail(_PARTITION, f"NkiTensor.{method}", "dim 0 of an on-chip tensor", tensor=self)


def _expand_ellipsis(keys: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    return (*keys[:at], *[Slice(None)] * (ndim - len(keys) + 1), *keys[at + 1 :])


def _infer(shape: tuple[int, ...], total: int) -> tuple[int, ...] | None:
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        shape = tuple(total // known if s == -1 else s for s in shape) if known else shape
    return shape if math.prod(shape) == total and min(shape, default=1) > 0 else None


def _reshape_strides(
    old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of `new` over the same elements, or None when a copy would be needed."""
    pairs = [(n, s) for n, s in zip(old, strides, strict=True) if n != 1]
    runs: list[tuple[int, int]] = []  # (elements, inner stride) of contiguous runs
    for count, stride in pairs:
        if runs and runs[-1][1] == count * stride:
            runs[-1] = (runs[-1][0] * count, stride)
        else:
            runs.append((count, stride))
    result: list[int] = []
    left, step, done = 1, 1, 1
    for size in reversed(new):
        if size == 1:
            result.append(step * left if left > 1 else 1)
            continue
        if left == 1:
            if not runs:
                return None
            left, step = runs.pop()
            done = 1
        if left % size:
            return None
        result.append(step * done)
        done *= size
        left //= size
    return tuple(reversed(result)) if left == 1 and not runs else None
