"""Operands that share memory: an output that covers part of an input.

An output over exactly the elements of an input is the usual in-place form. Where the two only
share some, the order of reads and writes inside the instruction decides, which no page fixes.
The simulator reads everything first. Does not look at [partitions, 1] operands: an engine reads
them before it starts.
"""

from __future__ import annotations

import numpy as np

from .errors import broken
from .region import overlap
from .rules import inferred
from .tensor import NkiTensor

_OVERLAP = inferred(
    "operand.overlap",
    "our reading of the nki.isa pages",
    "an output and an input share all of their elements, in the same order, or none",
)
MAX_WORK = 10_000


def _pattern(tensor: NkiTensor) -> list[tuple[int, int]]:
    """(count, stride) without dims of size one, neighbours that are one run merged."""
    merged: list[tuple[int, int]] = []
    for count, stride in zip(tensor.shape, tensor.strides, strict=True):
        if count == 1:
            continue
        if merged and merged[-1][1] == count * stride:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    return merged


def _same(a: NkiTensor, b: NkiTensor) -> bool:
    """Whether two views of one storage visit the same elements in the same order."""
    if a.dtype.itemsize != b.dtype.itemsize or a.offset != b.offset:
        return False
    return (a.shape == b.shape and a.strides == b.strides) or _pattern(a) == _pattern(b)


def check_overlap(opcode: str, dst: NkiTensor, src: NkiTensor) -> None:
    """Break the rule if `dst` shares only some elements with `src`, or in another order."""
    if dst.storage is not src.storage:
        own = dst.storage.own is not None and src.storage.own is not None
        if not own or not overlap(dst.storage.group.rect, src.storage.group.rect):
            return  # they share nothing
    elif _same(dst, src):
        return
    if src.size == src.shape[0] and dst.size != src.size:
        return  # one element per partition
    if _shared(dst, src):
        broken(
            _OVERLAP,
            f"nki.isa.{opcode}",
            "dst shares some elements with an input",
            dst=dst,
            src=src,
        )


def _shared(a: NkiTensor, b: NkiTensor) -> bool:
    if not overlap(a.rect, b.rect):
        return False
    if a.storage is not b.storage and _place(a) == _place(b):
        return False  # two names for the same bytes, in the same order
    if a.own_region.dense and b.own_region.dense:
        return True
    try:
        return bool(np.shares_memory(a.array, b.array, max_work=MAX_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _place(tensor: NkiTensor) -> tuple[object, ...]:
    array = tensor.array
    pairs = [(n, s) for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
    return array.__array_interface__["data"][0], pairs, tensor.dtype.itemsize
