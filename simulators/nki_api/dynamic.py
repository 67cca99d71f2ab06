"""Addresses known at run time: views made by .ap(scalar_offset= / vector_offset=) and selects.

DMA takes them, and tensor_copy those with one address; every other instruction refuses. The
address is base + index * the stride of the indirect dim; with a vector, row p of the view uses
index[p]. The index is read when the instruction runs. In shape-only mode, where indices are
unknown, they count as 0.

Source: nki.isa.dma_copy ("Indirect addressing"); NKI access patterns deep dive.
"""

from __future__ import annotations

from typing import Any, NoReturn

from . import dtypes
from .checks import check_written, source
from .errors import fail, unsupported
from .memory import HBM, SBUF
from .registers import Register
from .rules import documented
from .runtime import Run
from .tensor import NkiTensor

_OFFSET = documented(
    "dynamic.offset",
    "nki.isa.dma_copy, NKI access patterns",
    "scalar_offset is a register or an integer tile with one element in SBUF, vector_offset an "
    "integer tile in SBUF with an element for each row, never both; a vector indexes dim 0 of an "
    "HBM tensor, a scalar any dim but an on-chip dim 0",
)
_BOUNDS = documented(
    "dynamic.bounds",
    "nki.isa.dma_copy (oob_mode)",
    "a run-time address lies inside the tensor, or oob_mode.skip skips the transfer",
)


class IndirectTensor(NkiTensor):
    """A view whose first address is known at run time. It can only be given to a DMA."""

    __slots__ = ("index", "index_stride", "vector")

    index: Any
    index_stride: int
    vector: bool

    def is_indirect(self) -> bool:
        """True."""
        return True

    def _made(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: dtypes.DType | None = None,
    ) -> IndirectTensor:
        """A view of the other dims; the rows that a vector chooses stay together."""
        if self.vector and (shape[0], strides[0]) != (self.shape[0], self.strides[0]):
            unsupported("views of a view with run-time addresses that change its dim 0")
        made = IndirectTensor(self.storage, shape, strides, offset, self.dtype)
        made.index, made.index_stride, made.vector = self.index, self.index_stride, self.vector
        return made

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("views of a view with a run-time address", "index before .ap or select")

    view = ap = reinterpret_cast = _refuse

    @property
    def array(self) -> Any:
        """Never available: the address is not known yet."""
        raise AssertionError("an indirect view was read without being resolved")

    def pieces(self, instr: str, run: Run) -> list[NkiTensor | None]:
        """The static views to move: one, or one per row of a vector; None is out of bounds."""
        if type(self.index) is Register:
            indices = [self.index.value or 0]
        else:
            values = self._index_values(instr)
            flat = values.reshape(len(values), -1).T.reshape(-1)  # column by column
            flat = flat[: self.shape[0]] if self.vector else flat
            indices = flat.tolist() if run.values else [0] * len(flat)
        shape = (1, *self.shape[1:]) if self.vector else self.shape
        return [self._piece(index, shape) for index in indices]

    def _index_values(self, instr: str) -> Any:
        """The index tile. One scalar may lie on any partition: no engine's lanes read it."""
        tile = self.index
        if self.vector or type(tile) is not NkiTensor or tile.space == HBM:
            return source(instr, "offset", tile)
        if tile.storage.init.uniform <= 0:
            check_written(instr, "offset", tile)
        return tile.array

    def _piece(self, index: int, shape: tuple[int, ...]) -> NkiTensor | None:
        at = self.offset + index * self.index_stride
        last = at + sum((c - 1) * s for c, s in zip(shape, self.strides, strict=True))
        if index < 0 or not 0 <= at <= last < self.storage.partitions * self.row:
            return None
        return NkiTensor(self.storage, shape, self.strides, at, self.dtype)


def indirect_view(
    base: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    scalar: Any,
    vector: Any,
    dim: int,
    dtype: dtypes.DType | None = None,
) -> IndirectTensor:
    """A view of `base`'s storage that starts index * base.strides[dim] elements further on.

    dtype: that of the view, whose elements shape, strides and offset count; None: that of `base`.
    """
    index = scalar if vector is None else vector
    count = 1 if vector is None else shape[0]
    legal = (scalar is None) is not (vector is None)
    if type(index) is not Register or vector is not None:
        tile = type(index) is NkiTensor and index.space == SBUF and index.dtype.kind in "iu"
        legal = legal and tile and index.size >= count and (count > 1 or index.size == 1)
    if vector is not None:
        legal = legal and base.space == HBM and dim == 0
    legal = legal and -1 < dim < base.ndim and (base.space == HBM or dim != 0)
    if not legal:
        fail(_OFFSET, "NkiTensor", f"indirect_dim={dim}", tensor=base, offset=index)
    view = IndirectTensor(base.storage, shape, strides, offset, dtype or base.dtype)
    view.index, view.vector = index, vector is not None
    view.index_stride = base.strides[dim] * base.dtype.itemsize // view.dtype.itemsize
    return view


def resolved(instr: str, run: Run, tensor: Any) -> Any:
    """`tensor` with its one run-time address read; static tensors as they are."""
    if not isinstance(tensor, IndirectTensor) or tensor.vector:
        return tensor
    found = tensor.pieces(instr, run)[0]
    if found is None:
        fail(_BOUNDS, instr, "a run-time address is out of bounds", tensor=tensor)
    return found


def rows(instr: str, run: Run, tensor: NkiTensor, count: int) -> list[NkiTensor | None]:
    """`tensor` as `count` static views, resolving a run-time address."""
    found: list[NkiTensor | None] = (
        tensor.pieces(instr, run) if isinstance(tensor, IndirectTensor) else [tensor]
    )
    if len(found) == count:
        return found
    whole = found[0]
    return [None if whole is None else whole[i : i + 1] for i in range(count)]


def out_of_bounds(instr: str, dst: NkiTensor, src: NkiTensor) -> NoReturn:
    """Raise for an address outside its tensor under oob_mode.error."""
    fail(_BOUNDS, instr, "a run-time address is out of bounds", dst=dst, src=src)
