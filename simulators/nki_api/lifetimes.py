"""Capacity by last use, for kernels whose Python references outlive the last use of a tensor.

A list that keeps the tiles of earlier loop iterations keeps no bytes on the device: a compiler
frees a tensor after the last instruction that touches it. The simulator learns what was the last
one at the end, so once references hold more than fits it only notes first and last uses, and
decides when the kernel has ended. The message then is that of the allocation that did not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import NkiValidationError
from .rules import documented
from .tensor import NkiTensor

CAPACITY = documented(
    "memory.capacity",
    "architecture guide, SBUF and PSUM",
    "tensors between their first and last use fit in the memory of one core",
)
MOST_HELD = 4  # times the memory: references beyond that fail at once


class Lifetimes:
    """First and last uses in one memory, from the allocation that did not fit.

    space: SBUF or PSUM, as in memory.py.
    capacity: bytes per partition for automatic tensors.
    held: bytes of the tensors that were live then, by their number.
    problem: the message if it really does not fit.
    """

    def __init__(self, space: int, capacity: int, held: dict[int, int], problem: str) -> None:
        self.space = space
        self.capacity = capacity
        self.problem = problem
        self.bytes = dict(held)
        self.first = dict.fromkeys(held, 0)
        self.last: dict[int, int] = {}
        self.unplaced: dict[int, int] = {}  # live tensors that have no place, and their bytes

    def add(self, number: int, num_bytes: int, placed: bool) -> None:
        """A new tensor. Raises when references hold far too much."""
        self.bytes[number] = num_bytes
        if not placed:
            self.unplaced[number] = num_bytes
            if sum(self.unplaced.values()) > MOST_HELD * self.capacity:
                raise NkiValidationError(self.problem)

    def touch(self, now: int, tensors: Iterable[Any]) -> None:
        """Instruction `now` uses these operands (some may be no tensors)."""
        for tensor in tensors:
            if isinstance(tensor, NkiTensor) and tensor.space == self.space:
                number = tensor.storage.number
                if number in self.bytes:
                    self.first.setdefault(number, now)
                    self.last[number] = now

    def check(self) -> None:
        """Raise if more bytes than fit were in use by one instruction."""
        changes = []
        for number, last in self.last.items():
            changes.append((self.first[number], 1, self.bytes[number]))
            changes.append((last, 2, -self.bytes[number]))
        used = 0
        for _, _, change in sorted(changes):
            used += change
            if used > self.capacity:
                raise NkiValidationError(self.problem)
