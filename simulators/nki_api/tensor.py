"""NkiTensor: a strided view (shape, strides, offset, dtype) of an allocation.

Views never copy. Strides and offset are in elements; on chip, dim 0 is the partition dim and a
step of one partition is `row` elements. Indexing is in indexing.py, other views in views.py.
Does not know instructions; tensor indirection (.indirect) is not implemented.

Source: nki.language.NkiTensor and its methods.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from . import dtypes
from .arguments import guarded
from .errors import broken, unsupported
from .indexing import DynamicSlice as DynamicSlice
from .indexing import Indexing
from .memory import HBM, MemoryRegion, Storage
from .region import Rect, Region
from .view_rules import TRUTH
from .view_rules import row_major as row_major
from .views import Views


@functools.lru_cache(maxsize=65536)
def _on_chip(
    offset: int, row: int, shape: tuple[int, ...], strides: tuple[int, ...], item: int
) -> Region:
    """The bytes of an on-chip view; loops ask for the same ones again and again."""
    first, inner = divmod(offset, row)
    steps = (strides[0] // row, *[s * item for s in strides[1:]])
    return Region((first, inner * item, shape, steps, item))


class NkiTensor(Indexing, Views):
    """A tensor in SBUF, PSUM or HBM; see the module for what its fields mean."""

    __slots__ = (
        "array_",
        "checked",
        "dtype",
        "offset",
        "own_region_",
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
        self.own_region_: Any = None
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
        broken(TRUTH, "NkiTensor", "as a condition is true whatever it holds", tensor=self)
        return True

    def __eq__(self, other: object) -> bool:
        if self is not other and isinstance(other, (int, float, np.generic, np.ndarray)):
            raise TypeError("a tensor's values are not known while a kernel is built")
        return self is other

    __hash__ = object.__hash__

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
            storage = self.storage
            item = self.dtype.itemsize * storage.scale
            if self.space == HBM:
                steps = [s * item for s in self.strides]
                at = storage.base + self.offset * item
            else:
                partition, inner = divmod(self.offset, self.row)
                at = storage.base + partition * storage.pitch + inner * item
                steps = [s * item for s in self.strides]
                steps[0] = self.strides[0] // self.row * storage.pitch
            one = storage.scale == 1
            stored_as = self.dtype.np_dtype if one else storage.stored_as(self.dtype)
            found = np.ndarray(self.shape, stored_as, storage.data, at, steps)
            self.array_ = found
        return found

    @property
    def region(self) -> Region:
        """The bytes of this view in the storage's InitMap."""
        own, origin = self.own_region, self.storage.map_origin
        return own if origin == (0, 0) else own.moved(*origin)

    @property
    def own_region(self) -> Region:
        """The same counted from the storage's start; worked out once."""
        found = self.own_region_
        if found is None:
            item = self.dtype.itemsize
            if self.space == HBM:
                steps = (0, *[s * item for s in self.strides])
                found = Region((0, self.offset * item, (1, *self.shape), steps, item))
            else:
                found = _on_chip(self.offset, self.row, self.shape, self.strides, item)
            self.own_region_ = found
        return found

    @property
    def rect(self) -> Rect:
        """(partition, end, byte, end): the bounds of `region`."""
        return self.own_region.moved_rect(*self.storage.map_origin)

    def _made(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: dtypes.DType | None = None,
    ) -> NkiTensor:
        return NkiTensor(self.storage, shape, strides, offset, dtype or self.dtype)

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


# Not __getitem__, which every access goes through: it checks its indices itself.
for _name in (*vars(Views), "slice", "select", "vector_select"):
    if not _name.startswith("_") and callable(getattr(NkiTensor, _name)):
        setattr(NkiTensor, _name, guarded("NkiTensor", getattr(NkiTensor, _name)))
