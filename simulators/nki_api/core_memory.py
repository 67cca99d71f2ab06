"""SBUF and PSUM of a core: one byte array each, placement, capacity.

Both are single address spaces, so tensors placed by `address=` share bytes visibly. Tensors
without an address are placed automatically (first fit, from the top) and give their bytes back
when the last Python reference to them goes. They overlap nothing, so each has a dense array of
its own, which NumPy reads several times faster than rows of the big one.
When Python references keep more alive than fits, what counts is the last use, as for a compiler:
see lifetimes.py.

Sources: architecture guides ("SBUF", "PSUM"); nki.language.ndarray (address); nki.language
.tile_size (alignments).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from . import chips, dtypes
from .errors import broken, fail, message
from .freelist import FreeList
from .initmap import FRESH, InitMap
from .lifetimes import CAPACITY, QUARTERS, Lifetimes, quarters
from .memory import PSUM, SBUF, MemoryRegion, Storage
from .owners import Owners
from .region import Region
from .rules import documented, inferred

ROW_PAD = 192  # bytes between partitions, so that rows do not share cache sets
MIN_ALIGN = 4
MOST_IDLE = 8  # cores kept for the next run

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


Live = tuple[int, int, tuple[str, int, tuple[int, ...]], int, int, InitMap]
# (space, address, (name, number, shape), bytes per partition, quarters of the partitions, writes)


def _label(name: str, number: int, shape: tuple[int, ...]) -> str:
    return name or f"tensor {number} {shape}"


class Core:
    """SBUF and PSUM of one NeuronCore. Byte arrays are pooled between runs."""

    def __init__(self, chip: chips.Chip, precise: bool = True) -> None:
        self.chip = chip
        self.precise = precise
        self.scale = 1 if precise else 4  # of placed tensors: room for any type as float32
        self.values = True  # False in shape-only mode
        self.epoch = 0
        self.sbuf = np.empty(
            (chips.NUM_PARTITIONS, chip.sbuf_bytes * self.scale + ROW_PAD), np.uint8
        )
        self.psum = np.empty(
            (chips.NUM_PARTITIONS, chips.PSUM_BYTES * self.scale + ROW_PAD), np.uint8
        )
        self.spare: dict[int, list[Any]] = {}  # arrays of automatic tensors, by size
        self.reset()

    def reset(self) -> None:
        """Forget every tensor; storages of earlier epochs no longer give bytes back."""
        self.epoch += 1
        if sum(size * len(arrays) for size, arrays in self.spare.items()) > self.sbuf.size:
            self.spare.clear()
        self.sbuf_list = FreeList(self.chip.sbuf_usable_bytes)
        self.psum_list = FreeList(chips.PSUM_BYTES, chips.PSUM_BANK_BYTES)
        self.flights: list[Any] = []  # collectives that may still run (ranks/flights.py)
        self.lifetimes: dict[int, Lifetimes] = {}  # of memories that were full once
        self.live: dict[int, Live] = {}
        self.placed: dict[int, Owners] = {}
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
        space = SBUF if region is MemoryRegion.sbuf else PSUM
        free = self.sbuf_list if space == SBUF else self.psum_list
        row_bytes = dtype.itemsize
        for count in shape[1:]:
            row_bytes *= count
        if shape[0] > chips.NUM_PARTITIONS:
            fail(_PARTITIONS, "nki.language.ndarray", f"{shape[0]} partitions", tensor=shape)
        padded = -(-row_bytes // MIN_ALIGN) * MIN_ALIGN
        at = self._at(address, shape, dtype, row_bytes, space) if address else free.take(padded)
        if address is None:
            if at is None or space in self.lifetimes:
                area = padded * quarters(shape[0])
                asked = (shape, str(dtype), region.value)
                self._overflow(space, free, number, padded, area, at is not None, asked)
            scale = 1 if self.precise else dtypes.wide_scale(dtype)
            pitch = padded * scale
            spare = self.spare.get(shape[0] * pitch)
            data = spare.pop() if spare else np.empty(shape[0] * pitch, np.uint8)
            place = (data, 0, pitch)
        else:
            assert at is not None, "an address is checked, not searched"
            memory = self.sbuf if space == SBUF else self.psum
            scale = self.scale
            place = (memory, address[0] * memory.shape[1] + at * scale, memory.shape[1])
        storage = Storage(space, region, *place, shape[0], row_bytes, dtype, name, scale)
        if address is None and at is not None:
            label = (name, number, shape)
            self.live[number] = (space, at, label, padded, quarters(shape[0]), storage.init)
        storage.number, storage.core, storage.epoch = number, self, self.epoch
        storage.address = at or 0
        storage.silent = not self.values
        if address is not None:
            storage.first_partition = address[0]
            self._share(storage, space, storage.address)
        return storage

    def _share(self, storage: Storage, space: int, at: int) -> None:
        """Enter a placed tensor: its write state is that of the memory it lies in.

        Memory under no other live placed tensor starts as never written.
        """
        end = at + storage.row_bytes
        first = storage.first_partition
        rect = (first, first + storage.partitions, at, end)
        free = self.sbuf_list if space == SBUF else self.psum_list
        for other_space, other, name, size, *_ in () if free.holds(at, end) else self.live.values():
            if other_space == space and other < end and at < other + size:
                fail(
                    _ADDRESS,
                    "nki.language.ndarray",
                    f"address {(first, at)} of {storage.name or 'a tensor'} collides "
                    f"with {_label(*name)}, which the simulator placed automatically; place both",
                )
        free.reserve(at, end)
        init = self.placed_init.get(space)
        size = self.chip.sbuf_bytes if space == SBUF else chips.PSUM_BYTES
        if init is None:
            init = InitMap(chips.NUM_PARTITIONS, size, collapse=False)
            self.placed_init[space] = init
        storage.own, storage.init, storage.map_origin = storage.init, init, (first, at)
        owners = self.placed.get(space)
        if owners is None:
            owners = self.placed[space] = Owners(chips.NUM_PARTITIONS, size)
        storage.group, shares = owners.enter(storage.number, rect)
        if not shares:
            whole = Region.whole(storage.partitions, storage.row_bytes)
            init.mark_later(whole, storage.map_origin, FRESH)
            storage.fill()

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

    def _overflow(
        self,
        space: int,
        free: FreeList,
        number: int,
        num_bytes: int,
        area: int,
        placed: bool,
        asked: Any,
    ) -> None:
        """From the first tensor that finds no room, keep track of first and last uses."""
        known = self.lifetimes.get(space)
        if known is None:
            detail = self._full(space, num_bytes, free)
            problem = message(CAPACITY, "nki.language.ndarray", detail, {"tensor": asked})
            held = {n: r[3] * r[4] for n, r in self.live.items() if r[0] == space}
            used = {n for n in held if self.live[n][5].uniform != FRESH}
            capacity = QUARTERS * (free.size - free.reserved)
            known = self.lifetimes[space] = Lifetimes(space, capacity, held, used, problem)
        known.add(number, area, placed)

    def check_lifetimes(self) -> None:
        """At the end of a kernel: raise if its tensors in use did not fit."""
        for lifetimes in self.lifetimes.values():
            lifetimes.check()

    def _full(self, space: int, wanted: int, free: FreeList) -> str:
        rows = sorted((r for r in self.live.values() if r[0] == space), key=lambda r: -r[3])
        largest = ", ".join(f"{_label(*r[2])}: {r[3]}" for r in rows[:5])
        word = "PSUM" if space == PSUM else "SBUF"
        return (
            f"no room in {word} for {wanted} bytes per partition: {free.used} of {free.size} "
            f"in use by {len(rows)} live tensors (largest, bytes per partition: {largest}); "
            "a tensor lives from its first to its last use"
        )

    def release(self, storage: Storage) -> None:
        """A tensor is no longer used; one that was placed automatically gives its bytes back."""
        owners = self.placed.get(storage.space)
        if owners is not None:
            owners.leave(storage.number)
        lifetimes = self.lifetimes.get(storage.space)
        if lifetimes is not None and lifetimes.unplaced.pop(storage.number, None) is not None:
            self.spare.setdefault(storage.data.size, []).append(storage.data)
        entry = self.live.pop(storage.number, None)
        if entry is not None:
            (self.sbuf_list if entry[0] == SBUF else self.psum_list).give(entry[1], entry[3])
            self.spare.setdefault(storage.data.size, []).append(storage.data)


class CorePool:
    """Cores that are not in use, by generation: their memory is costly to touch first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, bool], list[Core]] = {}

    def borrow(self, chip: chips.Chip, precise: bool = True) -> Core:
        """A core with nothing in it."""
        with self._lock:
            idle = self._idle.get((chip.generation, precise))
            core = idle.pop() if idle else None
        if core is None:
            return Core(chip, precise)
        core.reset()
        return core

    def give_back(self, core: Core) -> None:
        """Hand a core back; its tensors must not be used any more."""
        with self._lock:
            idle = self._idle.setdefault((core.chip.generation, core.precise), [])
            if len(idle) < MOST_IDLE:
                idle.append(core)
