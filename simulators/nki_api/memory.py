"""Memory regions and allocations: HBM buffers, and what a tensor in SBUF or PSUM is a view of.

Fresh memory reads as NaN (integers as 4). Placement within a core is in core_memory.py, views in
tensor.py.

Source: nki.language.MemoryRegion; nki_simulator guide (uninitialized memory).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from . import dtypes
from .errors import unsupported
from .initmap import FRESH, OTHER, InitMap

if TYPE_CHECKING:
    from .core_memory import Core

HBM, SBUF, PSUM = 0, 1, 2


class MemoryRegion(Enum):
    """Where a tensor lives (nki.language.MemoryRegion)."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"


class Storage:
    """One allocation: bytes, place, owner and write state. Tensors are views of it.

    `row_bytes` is its size per partition (HBM: its whole size), `base` the byte offset of its
    first element in `data`, `pitch` the bytes from one partition to the next, `address` where it
    starts within a partition of the memory. `scale` is stored bytes per byte of the device.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "base",
        "collective",
        "core",
        "data",
        "dtype",
        "epoch",
        "first_partition",
        "group",
        "init",
        "io",
        "made_at",
        "map_origin",
        "name",
        "number",
        "own",
        "owner",
        "partitions",
        "pitch",
        "region",
        "row_bytes",
        "scale",
        "silent",
        "space",
        "watch",
    )

    def __init__(
        self,
        space: int,
        region: MemoryRegion,
        data: Any,
        base: int,
        pitch: int,
        partitions: int,
        row_bytes: int,
        dtype: dtypes.DType,
        name: str,
        scale: int = 1,
    ) -> None:
        self.space = space
        self.scale = scale
        self.region = region
        self.data = data
        self.base = base
        self.pitch = pitch
        self.partitions = partitions
        self.first_partition = 0
        self.address = 0
        self.row_bytes = row_bytes
        self.dtype = dtype
        self.name = name
        self.init = InitMap(partitions, row_bytes)  # a placed tensor: of the whole memory
        self.number = -1
        self.core: Core | None = None
        self.epoch = 0
        self.silent = False  # shape-only mode: contents do not matter
        self.made_at: Any = None  # (code, instruction) of the allocation
        self.io = False  # an input of the kernel
        self.owner: Any = None  # the run that made it; in HBM, the world of that run
        self.collective = False  # an operand of a collective
        self.own: InitMap | None = None  # a placed tensor: what was written by its own name
        self.group: Any = None  # a placed tensor: those of its rectangle (owners.Group)
        self.watch: Any = None  # shared HBM of two cores: their accesses (ranks/races.py)
        self.map_origin = (0, 0)  # this storage's place in `init`: (partition, byte)

    @property
    def site(self) -> tuple[str, int] | None:
        """File and line of the allocation, worked out when somebody asks."""
        if self.made_at is None:
            return None
        code, instruction = self.made_at
        lines = (line for start, end, line in code.co_lines() if start <= instruction < end)
        return code.co_filename, next(lines, None) or code.co_firstlineno

    def fill(self) -> None:
        """Give never-written memory its mark; called before the first read or partial write."""
        if self.silent:
            return
        item = self.dtype.itemsize
        shape = (self.partitions, self.row_bytes // item)
        steps = (self.pitch, item * self.scale)
        view = np.ndarray(shape, self.stored_as(self.dtype), self.data, self.base, steps)
        dtypes.fill_unwritten(view, self.dtype)

    def stored_as(self, dtype: dtypes.DType) -> Any:
        """The NumPy type of elements read as `dtype`."""
        if self.scale == 1:
            return dtype.np_dtype
        mixed = dtype is not self.dtype and {dtype, self.dtype} & dtypes.LOW_PRECISION
        if mixed or dtype.itemsize != self.dtype.itemsize:
            unsupported(
                f"reading {self.dtype} memory as {dtype} under NKI_PRECISE_FP=0",
                "low-precision types are stored as float32 in this mode",
            )
        return np.dtype(np.float32) if dtype in dtypes.LOW_PRECISION else dtype.np_dtype

    def __del__(self) -> None:
        core = self.core
        if core is not None and core.epoch == self.epoch:
            core.release(self)


def hbm_storage(
    num_bytes: int,
    dtype: dtypes.DType,
    region: MemoryRegion,
    name: str,
    data: Any = None,
    scale: int = 1,
) -> Storage:
    """An HBM buffer: fresh, or over `data` (a flat uint8 array), which then counts as written."""
    fresh = data is None
    flat = np.empty(num_bytes * scale, np.uint8) if fresh else data
    storage = Storage(HBM, region, flat, 0, num_bytes, 1, num_bytes, dtype, name, scale)
    storage.init.uniform = FRESH if fresh else OTHER
    return storage
