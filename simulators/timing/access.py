"""What a view of the log touches: partitions, byte range, contiguous runs; and which views overlap.

Does: turn log views into boxes that can be compared, exactly for equal strides and by byte range
otherwise. Does not: know instructions or costs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nxd_cp.simulators.nki_api.log import BufferInfo, View


@dataclass(frozen=True)
class Access:
    """One view, resolved. Bytes are per partition on chip; HBM is one partition.

    box: (stride, first, last) per dim, in bytes, outermost first; run_bytes: longest contiguous
    piece; inner_stride_bytes: step of the innermost dim that has more than one element.
    """

    buffer: int
    space: str
    partitions: int
    first_partition: int
    elements: int
    itemsize: int
    is_float: bool
    box: tuple[tuple[int, int, int], ...]
    low: int
    high: int
    run_bytes: int
    inner_stride_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.partitions * self.elements * self.itemsize


def itemsize(dtype: str) -> int:
    """Bytes per element, from the digits in the name: bfloat16 is 2, float8_e4m3 is 1.

    Raises ValueError for a name without a size.
    """
    if "tfloat32" in dtype or dtype == "tf32":
        return 4
    digits = re.search(r"\d+", dtype)
    if digits is None:
        if dtype in ("bool", "bool_"):
            return 1
        raise ValueError(f"dtype: expected a name with its size in bits, got {dtype!r}")
    packed = 4 if dtype.endswith("_x4") else 1
    return max(1, int(digits.group()) * packed // 8)


def resolve(view: View, buffer: BufferInfo) -> Access:
    """The Access of a view."""
    item = itemsize(view.dtype)
    on_chip = buffer.space != "hbm"
    offset = view.offset * item
    dims = [
        (abs(stride) * item, count)
        for stride, count in zip(view.strides, view.shape, strict=True)
        if count > 1 and stride
    ]
    partitions, first = 1, 0
    if on_chip:
        row = max(1, buffer.row_bytes)
        partitions, first = view.shape[0], offset // row
        offset -= first * row
        if dims and view.shape[0] > 1:
            dims = dims[1:]
    elements = 1
    for count in view.shape[1:] if on_chip else view.shape:
        elements *= count
    box = []
    rest = offset
    for stride, count in sorted(dims, reverse=True):
        start = rest // stride
        rest -= start * stride
        box.append((stride, start, start + count - 1))
    box.append((1, rest, rest + item - 1))
    span = sum(stride * (count - 1) for stride, count in dims)
    run = item
    for stride, count in sorted(dims):
        if stride != run:
            break
        run *= count
    free = slice(1 if on_chip else 0, None)
    steps = zip(reversed(view.strides[free]), reversed(view.shape[free]), strict=True)
    inner = next((stride * item for stride, count in steps if count > 1), item)
    return Access(
        buffer=view.buffer,
        space=buffer.space,
        partitions=partitions,
        first_partition=first + (buffer.first_partition if on_chip else 0),
        elements=elements,
        itemsize=item,
        is_float="float" in view.dtype or "bf16" in view.dtype,
        box=tuple(box),
        low=offset,
        high=offset + span + item,
        run_bytes=run,
        inner_stride_bytes=abs(inner),
    )


def overlap(a: Access, b: Access) -> bool:
    """Whether two accesses of one buffer can touch the same byte (never a false no)."""
    if a.high <= b.low or b.high <= a.low:
        return False
    a_end, b_end = a.first_partition + a.partitions, b.first_partition + b.partitions
    if a_end <= b.first_partition or b_end <= a.first_partition:
        return False
    if [dim[0] for dim in a.box] != [dim[0] for dim in b.box]:
        return True
    return all(x[1] <= y[2] and y[1] <= x[2] for x, y in zip(a.box, b.box, strict=True))
