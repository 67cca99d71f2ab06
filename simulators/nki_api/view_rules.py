"""Rules of views that several kinds of view share, and the strides that layouts have.

Source: nki.language.NkiTensor and its methods.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from .errors import fail
from .rules import documented, inferred

BOUNDS = documented(
    "view.bounds",
    "nki.language.NkiTensor",
    "an index or slice lies inside the tensor and is not empty; dims count from the front",
)
SHAPE = documented(
    "view.shape",
    "nki.language.NkiTensor",
    "a view has at most 5 dims and covers what it is a view of",
)
LAYOUT = documented(
    "view.layout",
    "nki.language.NkiTensor",
    "the memory layout allows the requested view without a copy",
)
PARTITION = documented(
    "view.partition_dim",
    "nki.language.NkiTensor",
    "dim 0 of an on-chip tensor stays the partition dim, in steps of one",
)
TRUTH = inferred(
    "tensor.truth",
    "nki.language.NkiTensor, which has no truth value; nki-library@d2ad3a5 (mlp_tkg_constants.py)",
    "a condition asks whether a tensor is there with != None, and cannot ask what it holds",
)
UNUSED = inferred(
    "view.outside",
    "NKI access patterns deep dive (.ap does not access memory); nki-library@d2ad3a5",
    "a pattern that reaches outside its tensor is not even made; used, it breaks view.bounds",
)
MAX_DIMS = 5


def check_dim(method: str, tensor: Any, dim: int, end: int | None = None) -> None:
    """Refuse a dim that is not one of `end` dims (by default, of those that the tensor has)."""
    if not 0 <= dim < (tensor.ndim if end is None else end):
        fail(BOUNDS, f"NkiTensor.{method}", f"dim {dim} of {tensor.ndim} dims", tensor=tensor)


@functools.lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor."""
    strides, step = [], 1
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


def infer_shape(shape: tuple[int, ...], total: int) -> tuple[int, ...] | None:
    """`shape` with its -1 filled in, or None where it does not hold `total` elements."""
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        shape = tuple(total // known if s == -1 else s for s in shape) if known else shape
    return shape if math.prod(shape) == total and min(shape, default=1) > 0 else None


def reshape_strides(
    old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of `new` over the same elements, or None when a copy would be needed.

    A dim of size 1 has the stride of its place, the elements within it: a run-time address on this
    dim (`.ap(indirect_dim=)`) counts in it.
    """
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
        if size != 1 and left == 1:
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
