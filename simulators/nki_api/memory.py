"""Memory: HBM buffers, and SBUF and PSUM as one byte array per core.

SBUF and PSUM are single address spaces, so tensors placed by `address=` share bytes visibly.
Tensors without an address are placed automatically (first fit, from the top) and give their bytes
back when the last Python reference to them goes. They overlap nothing, so each has a dense array
of its own, which NumPy reads several times faster than rows of the big one.
Fresh memory reads as NaN (integers as 4).
Does not know instructions or views: see tensor.py and checks.py.

Sources: architecture guides ("SBUF", "PSUM"); nki.language.ndarray (address); nki.language
.tile_size (alignments).
"""

from __future__ import annotations

import threading
from bisect import insort
from enum import Enum
from typing import Any

import numpy as np

from . import chips, dtypes
from .errors import broken, fail
from .initmap import FRESH, OTHER, InitMap, Rect, overlap
from .rules import documented, inferred

HBM, SBUF, PSUM = 0, 1, 2
ROW_PAD = 192  # bytes between partitions, so that rows do not share cache sets
MIN_ALIGN = 4

_CAPACITY = documented(
    "memory.capacity",
    "architecture guide, SBUF and PSUM",
    "live tensors fit in the memory of one core",
)
_PARTITIONS = documented(
    "memory.partitions",
    "nki.language.tile_size.pmax",
    "an on-chip tensor has at most 128 partitions",
)
_ADDRESS = documented(
    "memory.address",
    "nki.language.ndarray",
    "address=(partition, byte) lies inside the memory, aligned (element; PSUM bank)",
)
_ALIGNMENT = inferred(
    "memory.alignment",
    "nki.language.tile_size.sbuf_min_align; nki-library@d2ad3a5 places bf16 at even bytes",
    "an SBUF address is a multiple of 4 bytes",
)


class MemoryRegion(Enum):
    """Where a tensor lives (nki.language.MemoryRegion)."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"


_SPACE = {"sbuf": SBUF, "psum": PSUM, "private_hbm": HBM, "shared_hbm": HBM}


class FreeList:
    """First-fit free intervals of [0, size); blocks of at most `block` bytes never cross one."""

    def __init__(self, size: int, block: int = 0) -> None:
        self.size = size
        self.block = block
        self.free: list[tuple[int, int]] = [(0, size)]
        self.used = 0
        self.peak = 0

    def take(self, num_bytes: int) -> int | None:
        """The address of a new block, or None; high addresses first (people place from 0)."""
        for index in range(len(self.free) - 1, -1, -1):
            start, end = self.free[index]
            at = self._fit(end, num_bytes)
            if at >= start:
                pieces = [p for p in ((start, at), (at + num_bytes, end)) if p[0] < p[1]]
                self.free[index : index + 1] = pieces
                self.used += num_bytes
                self.peak = max(self.peak, self.used)
                return at
        return None

    def _fit(self, end: int, num_bytes: int) -> int:
        """The highest start of a block that ends at or before `end`."""
        at, block = end - num_bytes, self.block
        if not block:
            return at
        if num_bytes > block:
            return at // block * block
        limit = (end - 1) // block * block  # start of the last block before `end`
        return at if at >= limit else limit - num_bytes

    def reserve(self, start: int, end: int) -> None:
        """Take [start, end) out of automatic use for the rest of the run."""
        pieces = [
            (s, e)
            for low, high in self.free
            for s, e in ((low, min(high, start)), (max(low, end), high))
            if s < e
        ]
        self.free = sorted(set(pieces))

    def give(self, at: int, num_bytes: int) -> None:
        """Give a block back; neighbours merge."""
        self.used -= num_bytes
        insort(self.free, (at, at + num_bytes))
        merged: list[tuple[int, int]] = []
        for start, end in self.free:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self.free = merged


class Neighbours:
    """Rectangles of live placed tensors, found by the blocks of bytes that they touch."""

    BLOCK = 2048

    def __init__(self) -> None:
        self.rects: dict[int, Rect] = {}
        self.blocks: dict[int, dict[int, Rect]] = {}

    def _touched(self, rect: Rect) -> range:
        return range(rect[2] // self.BLOCK, -(-rect[3] // self.BLOCK))

    def overlaps(self, rect: Rect) -> bool:
        """Whether any rectangle shares a byte with `rect`."""
        empty: dict[int, Rect] = {}
        return any(
            overlap(rect, other)
            for block in self._touched(rect)
            for other in self.blocks.get(block, empty).values()
        )

    def add(self, number: int, rect: Rect) -> None:
        """Enter the rectangle of tensor `number`."""
        self.rects[number] = rect
        for block in self._touched(rect):
            self.blocks.setdefault(block, {})[number] = rect

    def remove(self, number: int) -> None:
        """Forget a tensor; one that was never entered is ignored."""
        rect = self.rects.pop(number, None)
        for block in self._touched(rect) if rect is not None else ():
            del self.blocks[block][number]


class Storage:
    """One allocation: bytes, place, owner and write state. Tensors are views of it.

    `row_bytes` is its size per partition (HBM: its whole size), `base` the byte offset of its
    first element in `data`, `pitch` the bytes from one partition to the next, `address` where it
    starts within a partition of the memory.
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
        "init",
        "io",
        "map_origin",
        "name",
        "number",
        "own",
        "partitions",
        "pitch",
        "region",
        "row_bytes",
        "silent",
        "site",
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
    ) -> None:
        self.space = space
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
        self.init = InitMap(partitions, row_bytes, dtype.itemsize)
        self.number = -1
        self.core: Core | None = None
        self.epoch = 0
        self.silent = False  # shape-only mode: contents do not matter
        self.site: Any = None  # (code, line) of the allocation
        self.io = False  # an input of the kernel
        self.collective = False  # an operand of a collective
        self.own: InitMap | None = None  # a placed tensor: what was written by its own name
        self.watch: Any = None  # shared HBM of two cores: their accesses (ranks/races.py)
        self.map_origin = (0, 0)  # this storage's place in `init`: (partition, byte)

    def fill(self) -> None:
        """Give never-written memory its mark; called before the first read or partial write."""
        if self.silent:
            return
        item = self.dtype.itemsize
        shape = (self.partitions, self.row_bytes // item)
        view = np.ndarray(shape, self.dtype.np_dtype, self.data, self.base, (self.pitch, item))
        dtypes.fill_unwritten(view, self.dtype)

    def __del__(self) -> None:
        core = self.core
        if core is not None and core.epoch == self.epoch:
            core.release(self)


class Core:
    """SBUF and PSUM of one NeuronCore. Byte arrays are pooled between runs."""

    def __init__(self, chip: chips.Chip) -> None:
        self.chip = chip
        self.values = True  # False in shape-only mode
        self.epoch = 0
        self.sbuf = np.empty((chips.NUM_PARTITIONS, chip.sbuf_bytes + ROW_PAD), np.uint8)
        self.psum = np.empty((chips.NUM_PARTITIONS, chips.PSUM_BYTES + ROW_PAD), np.uint8)
        self.spare: dict[int, list[Any]] = {}  # arrays of automatic tensors, by size
        self.reset()

    def reset(self) -> None:
        """Forget every tensor; storages of earlier epochs no longer give bytes back."""
        self.epoch += 1
        if sum(size * len(arrays) for size, arrays in self.spare.items()) > self.sbuf.size:
            self.spare.clear()
        self.sbuf_list = FreeList(self.chip.sbuf_usable_bytes)
        self.psum_list = FreeList(chips.PSUM_BYTES, chips.PSUM_BANK_BYTES)
        self.live: dict[int, tuple[int, int, str, int]] = {}
        self.placed: dict[int, Neighbours] = {}
        self.placed_init: dict[int, InitMap] = {}

    def allocate(
        self,
        shape: tuple[int, ...],
        dtype: dtypes.DType,
        region: MemoryRegion,
        name: str,
        number: int,
        address: tuple[int, int] | None,
    ) -> Storage:
        """Place a tensor of `shape`; `number` identifies it in the log."""
        space = _SPACE[region.value]
        free = self.sbuf_list if space == SBUF else self.psum_list
        row_bytes = dtype.itemsize
        for count in shape[1:]:
            row_bytes *= count
        asked = (shape, str(dtype), region.value)
        if shape[0] > chips.NUM_PARTITIONS:
            fail(_PARTITIONS, "nki.language.ndarray", f"{shape[0]} partitions", tensor=asked)
        padded = -(-row_bytes // MIN_ALIGN) * MIN_ALIGN
        at = self._at(address, shape, dtype, row_bytes, space) if address else free.take(padded)
        if at is None:
            fail(_CAPACITY, "nki.language.ndarray", self._full(space, padded, free), tensor=asked)
        label = name or f"tensor {number} {shape}"
        if address is None:
            spare = self.spare.get(shape[0] * padded)
            data = spare.pop() if spare else np.empty(shape[0] * padded, np.uint8)
            place = (data, 0, padded)
            self.live[number] = (space, at, label, padded)
        else:
            memory = self.sbuf if space == SBUF else self.psum
            place = (memory, address[0] * memory.shape[1] + at, memory.shape[1])
        storage = Storage(space, region, *place, shape[0], row_bytes, dtype, name)
        storage.number, storage.core, storage.epoch = number, self, self.epoch
        storage.address = at
        storage.silent = not self.values
        if address is not None:
            storage.first_partition = address[0]
            self._share(storage, space, at, label)
        return storage

    def _share(self, storage: Storage, space: int, at: int, label: str) -> None:
        """Enter a placed tensor: its write state is that of the memory it lies in.

        Memory under no other live placed tensor starts as never written.
        """
        end = at + storage.row_bytes
        first = storage.first_partition
        rect = (first, first + storage.partitions, at, end)
        for other_space, other, name, size in self.live.values():
            if other_space == space and other < end and at < other + size:
                fail(
                    _ADDRESS,
                    "nki.language.ndarray",
                    f"address {(first, at)} of {label} collides "
                    f"with {name}, which the simulator placed automatically; place both",
                )
        (self.sbuf_list if space == SBUF else self.psum_list).reserve(at, end)
        init = self.placed_init.get(space)
        if init is None:
            size = self.chip.sbuf_bytes if space == SBUF else chips.PSUM_BYTES
            init = InitMap(chips.NUM_PARTITIONS, size, MIN_ALIGN, collapse=False)
            self.placed_init[space] = init
        storage.init, storage.map_origin = init, (first, at)
        storage.own = InitMap(storage.partitions, storage.row_bytes, MIN_ALIGN)
        neighbours = self.placed.setdefault(space, Neighbours())
        if not neighbours.overlaps(rect):
            shape = (storage.partitions, storage.row_bytes)
            init.mark(rect, True, (first, at, shape, (1, 1), 1), FRESH)
            storage.fill()
        neighbours.add(storage.number, rect)

    def _at(
        self,
        address: tuple[int, int],
        shape: tuple[int, ...],
        dtype: dtypes.DType,
        row_bytes: int,
        space: int,
    ) -> int:
        partition, at = address
        partitions = shape[0]
        size = chips.PSUM_BYTES if space == PSUM else self.chip.sbuf_usable_bytes
        align = chips.PSUM_BANK_BYTES if space == PSUM else dtype.itemsize
        inside = 0 <= partition <= chips.NUM_PARTITIONS - partitions and 0 <= at <= size - row_bytes
        if not inside or at % align:
            fail(
                _ADDRESS,
                "nki.language.ndarray",
                f"address {address} for {partitions} partitions x {row_bytes} bytes; "
                f"memory is 128 x {size} bytes, alignment {align}",
            )
        if at % MIN_ALIGN:
            broken(
                _ALIGNMENT, "nki.language.ndarray", f"address {address}", tensor=(shape, str(dtype))
            )
        return at

    def _full(self, space: int, wanted: int, free: FreeList) -> str:
        rows = sorted((r for r in self.live.values() if r[0] == space), key=lambda r: -r[3])
        largest = ", ".join(f"{r[2]}: {r[3]}" for r in rows[:5])
        word = "PSUM" if space == PSUM else "SBUF"
        return (
            f"no room in {word} for {wanted} bytes per partition: {free.used} of {free.size} "
            f"in use by {len(rows)} live tensors (largest, bytes per partition: {largest}); "
            "a tensor lives as long as a Python name refers to it"
        )

    def release(self, storage: Storage) -> None:
        """A tensor is no longer used; one that was placed automatically gives its bytes back."""
        neighbours = self.placed.get(storage.space)
        if neighbours is not None:
            neighbours.remove(storage.number)
        entry = self.live.pop(storage.number, None)
        if entry is not None:
            (self.sbuf_list if entry[0] == SBUF else self.psum_list).give(entry[1], entry[3])
            self.spare.setdefault(storage.data.size, []).append(storage.data)


def hbm_storage(
    num_bytes: int, dtype: dtypes.DType, region: MemoryRegion, name: str, data: Any = None
) -> Storage:
    """An HBM buffer: fresh, or over `data` (a flat uint8 array), which then counts as written."""
    fresh = data is None
    flat = np.empty(num_bytes, np.uint8) if fresh else data
    storage = Storage(HBM, region, flat, 0, num_bytes, 1, num_bytes, dtype, name)
    storage.init.uniform = FRESH if fresh else OTHER
    return storage


class CorePool:
    """Cores that are not in use, by generation: their memory is costly to touch first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[Core]] = {}

    def borrow(self, chip: chips.Chip) -> Core:
        """A core with nothing in it."""
        with self._lock:
            idle = self._idle.get(chip.generation)
            core = idle.pop() if idle else None
        if core is None:
            return Core(chip)
        core.reset()
        return core

    def give_back(self, core: Core) -> None:
        """Hand a core back; its tensors must not be used any more."""
        with self._lock:
            self._idle.setdefault(core.chip.generation, []).append(core)
