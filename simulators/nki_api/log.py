"""The instruction log: one fixed-size record of integers per instruction.

Records refer to tables (opcodes, engines, source lines, buffers, views), so that appending costs
well under a microsecond; byte ranges are worked out from the view table when asked for.
Does not time anything: costs are a pure function of the log, computed elsewhere.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

MAX_OPERANDS = 6  # the destination first
WIDTH = 6 + MAX_OPERANDS  # opcode, engine, line, elements, flags, detail, operands
NONE = -1
_PADDING = [NONE] * MAX_OPERANDS
# Files of the simulator: not the kernel's line.
HELPERS = frozenset(str(path) for path in Path(__file__).parent.rglob("*.py"))

# Bits of `flags`. Bits 8..15 hold a row tile size of TensorE, 16..23 a column tile size (0: 128).
ACCUMULATE = 1  # a matmul adds onto its PSUM destination
READ_ACCUMULATOR = 2  # reduce_res is given (last of the sources): a second, read-out instruction
TRANSPOSE = 4  # a matmul or DMA in transpose mode
DOUBLE_ROW = 8  # a matmul in a double-rate fp8 mode
DYNAMIC = 16  # an address known at run time only
SKIPPED = 32  # a DMA skipped because its index is out of bounds
ONEZERO = 64  # a matmul operand declared to hold ones and zeros


class View(NamedTuple):
    """One access pattern: element offset, shape and strides in a buffer, read as `dtype`."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class BufferInfo(NamedTuple):
    """One allocation: `space` is hbm, sbuf or psum; `address` in bytes within a partition.

    `core` is -1 for HBM that the cores of a rank share.
    """

    space: str
    name: str
    dtype: str
    partitions: int
    row_bytes: int
    first_partition: int
    address: int
    rank: int = 0
    core: int = 0


@dataclass(frozen=True)
class Exchange:
    """A record in which cores meet: a collective, a sendrecv or a barrier.

    seq: the record's number in this log.
    meeting: the same number in the log of every member.
    kind: the function's name ("all_gather", "sendrecv", "core_barrier", ...).
    members: (rank, core) of all who meet, in group order.
    sends_to, receives_from: (rank, core) of the others whose data come here or who get ours.
    sources, destinations: this member's tensors, channel by channel.
    bytes_sent, bytes_received: payload that leaves and enters this core, whatever the algorithm.
    group: ranks in group (or ring) order; channels: channel ids, empty where there are none.
    """

    seq: int
    meeting: int
    kind: str
    members: tuple[tuple[int, int], ...]
    sends_to: tuple[tuple[int, int], ...]
    receives_from: tuple[tuple[int, int], ...]
    sources: tuple[View, ...]
    destinations: tuple[View, ...]
    bytes_sent: int
    bytes_received: int
    group: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """One instruction, tables resolved. `elements` is per partition of the largest operand.

    `detail` is one word: the activation function, the first operator, or a DMA's dge mode.
    """

    seq: int
    opcode: str
    engine: str
    file: str
    line: int
    elements: int
    flags: int
    detail: str
    dst: View | None
    sources: tuple[View, ...]


class Log:
    """Instructions of one core in program order. `len`, indexing and iteration give Records.

    What `record` gives is the log of rank 0, core 0; `cores[rank, core]` are all of them. They
    share one table of buffers.
    """

    def __init__(self, first: Log | None = None) -> None:
        self.rows = array("q")
        self.buffers: list[BufferInfo] = [] if first is None else first.buffers
        self.cores: dict[tuple[int, int], Log] = {(0, 0): self} if first is None else first.cores
        self.exchanges: list[Exchange] = []
        self.names: list[str] = []
        self._name_ids: dict[str, int] = {}
        self._words: dict[tuple[str, str, str], tuple[int, ...]] = {}
        self._views: list[View] = []  # of the first keys of _view_ids; the rest when asked for
        self._view_ids: dict[tuple[Any, ...], int] = {}
        self.lines: list[tuple[str, int]] = []
        self._line_ids: dict[tuple[str, int], int] = {}
        self._line_of: dict[tuple[int, int], int] = {}  # by (id of a code object, instruction)
        self._codes: list[CodeType] = []  # kept, so that their ids stay theirs

    @property
    def views(self) -> list[View]:
        """The table of views."""
        if len(self._views) < len(self._view_ids):
            for key in islice(self._view_ids, len(self._views), None):
                number, offset, shape, strides, dtype = key
                self._views.append(View(number, offset, shape, strides, str(dtype)))
        return self._views

    def __len__(self) -> int:
        return len(self.rows) // WIDTH

    def __getitem__(self, seq: int) -> Record:
        if seq < 0:
            seq += len(self)
        if not 0 <= seq < len(self):
            raise IndexError(f"log has {len(self)} records, asked for {seq}")
        row = self.rows[seq * WIDTH : (seq + 1) * WIDTH]
        file, line = self.lines[row[2]]
        views = [self.views[v] if v != NONE else None for v in row[6:]]
        return Record(
            seq,
            self.names[row[0]],
            self.names[row[1]],
            file,
            line,
            row[3],
            row[4],
            self.names[row[5]],
            views[0],
            tuple(v for v in views[1:] if v is not None),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def of_core(self, rank: int, core: int) -> Log:
        """The log of one core of the same run, made when first asked for."""
        found = self.cores.get((rank, core))
        if found is None:
            found = self.cores[rank, core] = Log(self)
        return found

    def counts(self) -> Counter[str]:
        """How often each opcode occurs."""
        return Counter(self.names[i] for i in self.rows[::WIDTH])

    def add(
        self,
        opcode: str,
        engine: str,
        dst: Any,
        sources: Sequence[Any],
        elements: int,
        flags: int = 0,
        depth: int = 1,
        detail: str = "",
    ) -> None:
        """Append one instruction; the kernel's line is outside the simulator."""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None and frame.f_code.co_filename in HELPERS:
            frame = frame.f_back
        assert frame is not None, "a kernel is outside the helpers"
        line = self._line_of.get((id(frame.f_code), frame.f_lasti))
        if line is None:
            line = self._new_line(frame)
        operands = [NONE if dst is None else self._view(dst)]
        operands += [self._view(s) for s in sources]
        operands += _PADDING[len(operands) :]
        words = self._words.get((opcode, engine, detail))
        if words is None:
            words = tuple(self._name(word) for word in (opcode, engine, detail))
            self._words[opcode, engine, detail] = words
        head = [words[0], words[1], line, elements, flags, words[2]]
        self.rows.extend(head + operands[:MAX_OPERANDS])

    def _new_line(self, frame: FrameType) -> int:
        """The number of a frame's line; to work a line out is slow, so each place does it once."""
        place = (frame.f_code.co_filename, frame.f_lineno)
        line = self._line_ids.setdefault(place, len(self.lines))
        if line == len(self.lines):
            self.lines.append(place)
        self._codes.append(frame.f_code)
        self._line_of[id(frame.f_code), frame.f_lasti] = line
        return line

    def _name(self, name: str) -> int:
        found = self._name_ids.get(name)
        if found is None:
            found = self._name_ids[name] = len(self.names)
            self.names.append(name)
        return found

    def view(self, tensor: Any) -> View:
        """The table's entry for a tensor."""
        number = self._view(tensor)  # before the table is read, which this may lengthen
        return self.views[number]

    def _view(self, tensor: Any) -> int:
        key = (tensor.storage.number, tensor.offset, tensor.shape, tensor.strides, tensor.dtype)
        found = self._view_ids.get(key)
        if found is None:
            found = self._view_ids[key] = len(self._view_ids)
        return found
