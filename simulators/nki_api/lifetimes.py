"""Capacity by last use, for kernels whose Python references outlive the last use of a tensor.

A list that keeps the tiles of earlier loop iterations keeps no bytes on the device: a compiler
frees a tensor after the last instruction that touches it. The simulator learns what was the last
one at the end, so once references hold more than fits it only notes first and last uses, and
decides when the kernel has ended. The message then is that of the allocation that did not fit.
What counts then is area: tensors of at most 64 or 32 partitions lie beside each other, on halves
or quarters of the partitions. Whether the rectangles can be packed is not worked out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from .errors import TOLERATED, NkiSimulatorWarning, NkiValidationError
from .rules import documented
from .tensor import NkiTensor

CAPACITY = documented(
    "memory.capacity",
    "architecture guide, SBUF and PSUM",
    "tensors between their first and last use fit in the memory of one core",
)
QUARTERS = 4
MOST_HELD = 4  # times the memory: references beyond that fail at once


def quarters(partitions: int) -> int:
    """How many quarters of the partitions a tensor takes."""
    return 4 if partitions > 64 else 2 if partitions > 32 else 1


class Lifetimes:
    """First and last uses in one memory, from the allocation that did not fit.

    space: SBUF or PSUM, as in memory.py.
    capacity: bytes for automatic tensors, per partition and times the quarters.
    held: the same of the tensors that were live then, by their number.
    used: the numbers of those that had been written; the others' first use is yet to come.
    problem: the message if it really does not fit.
    """

    def __init__(
        self, space: int, capacity: int, held: dict[int, int], used: Iterable[int], problem: str
    ) -> None:
        self.space = space
        self.capacity = capacity
        self.problem = problem
        self.area = dict(held)
        self.first = dict.fromkeys(used, 0)
        self.last: dict[int, int] = {}
        self.unplaced: dict[int, int] = {}  # live tensors that have no place, and their areas

    def add(self, number: int, area: int, placed: bool) -> None:
        """A new tensor. Raises when references hold far too much."""
        self.area[number] = area
        if not placed:
            self.unplaced[number] = area
            if sum(self.unplaced.values()) > MOST_HELD * self.capacity:
                raise NkiValidationError(self.problem)

    def touch(self, now: int, tensors: Iterable[Any]) -> None:
        """Instruction `now` uses these operands (some may be no tensors)."""
        for tensor in tensors:
            if isinstance(tensor, NkiTensor) and tensor.space == self.space:
                number = tensor.storage.number
                if number in self.area:
                    self.first.setdefault(number, now)
                    self.last[number] = now

    def check(self) -> None:
        """Raise if more than fits was in use by one instruction."""
        changes = []
        for number, last in self.last.items():
            changes.append((self.first[number], 1, self.area[number]))
            changes.append((last, 2, -self.area[number]))
        used = 0
        for _, _, change in sorted(changes):
            used += change
            if used > self.capacity:
                if CAPACITY.id not in TOLERATED.get():
                    raise NkiValidationError(self.problem)
                warnings.warn(self.problem, NkiSimulatorWarning, stacklevel=2)
                return
