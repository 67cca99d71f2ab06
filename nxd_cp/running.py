"""What a rank has so far for its own rows: what a forward returns, dq in the backward.

Does: hold it between the rectangles of all hops, and hand to a backend the part that a rectangle
carries on. Does not: merge or add (`backends/` do).

Note [Pieces]
    A backend that adds in place gets views of one tensor of all rows. A backend whose kernels read
    the carry and write the merged result wants whole tensors on both sides, since a slice would be
    copied first. So its rows lie in pieces, each a tensor of its own, cut where rectangles are cut;
    a rectangle over several pieces is computed piece by piece. Then a hop reads what it carries
    once, writes it once, and nothing else touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.backends.intervals import as_band
from nxd_cp.schedule import Bounded

Values = TypeVar("Values", bound=tuple[Tensor, ...])  # of the same rows, which are dim 2
Piece = tuple[int, int, Values]  # first row, stop row


class Running(Generic[Values]):
    """The values of rows 0 to num_rows - 1.

    empty: makes the values of so many rows that nothing was added to. in_place: the backend adds to
    what it is given (see the Note).
    """

    def __init__(self, num_rows: int, empty: Callable[[int], Values], *, in_place: bool) -> None:
        self._num_rows, self._empty, self._in_place = num_rows, empty, in_place
        self._pieces: list[Piece[Values]] = []

    def cut(self, rows: slice, mask: BlockMask) -> Iterator[tuple[slice, BlockMask]]:
        """A rectangle's rows and mask, cut so that each part carries one piece or nothing.

        A triangle stays whole: the pieces under it are joined, which copies them.
        """
        edges = [rows.start, rows.stop]
        if not self._in_place:
            self._split_at(rows.start)
            self._split_at(rows.stop)
            inside = [p for p in self._pieces if rows.start <= p[0] and p[1] <= rows.stop]
            edges = sorted({*edges, *(edge for piece in inside for edge in piece[:2])})
        if len(edges) > 2 and mask in ("causal", "strict"):
            self.put(rows, self._joined(rows))
            edges = [rows.start, rows.stop]
        for start, stop in pairwise(edges):
            yield slice(start, stop), _of_rows(mask, start - rows.start, stop - rows.start)

    def take(self, rows: slice) -> Values | None:
        """What rows of `cut` have so far; None for nothing yet."""
        if self._in_place and not self._pieces and rows != slice(0, self._num_rows):
            self._pieces = [(0, self._num_rows, self._empty(self._num_rows))]
        for start, stop, values in self._pieces:
            if start <= rows.start and rows.stop <= stop:
                return _rows(values, rows.start - start, rows.stop - start)
        return None

    def put(self, rows: slice, values: Values) -> None:
        """What rows of `take` have now."""
        if self._in_place and self._pieces:
            return  # it was added in place
        kept = [p for p in self._pieces if p[1] <= rows.start or p[0] >= rows.stop]
        self._pieces = sorted([*kept, (rows.start, rows.stop, values)], key=lambda p: p[0])

    def finish(self) -> Values:
        """The values of all rows."""
        return self._joined(slice(0, self._num_rows))

    def _joined(self, rows: slice) -> Values:
        """The values of rows that whole pieces cover, empty ones between them."""
        parts, place = [], rows.start
        for start, stop, values in self._pieces:
            if rows.start <= start and stop <= rows.stop:
                parts += [self._empty(start - place)] * (place < start) + [values]
                place = stop
        if place < rows.stop:
            parts.append(self._empty(rows.stop - place))
        if len(parts) == 1:
            return parts[0]
        return cast(Values, tuple(torch.cat(one, dim=2) for one in zip(*parts, strict=True)))

    def _split_at(self, row: int) -> None:
        """No piece reaches over `row`; both sides are views until they are put again."""
        pieces: list[Piece[Values]] = []
        for start, stop, values in self._pieces:
            edges = [start, row, stop] if start < row < stop else [start, stop]
            pieces += [(a, b, _rows(values, a - start, b - start)) for a, b in pairwise(edges)]
        self._pieces = pieces


def _rows(values: Values, start: int, stop: int) -> Values:
    return cast(Values, tuple(x[:, :, start:stop] for x in values))


def _of_rows(mask: BlockMask, start: int, stop: int) -> BlockMask:
    """The mask of rows start to stop - 1 of a rectangle."""
    if isinstance(mask, Documents):
        band = as_band(mask.mask, mask.q_ids.shape[1], mask.k_ids.shape[1])
        return Documents(band.within(start, 0), mask.q_ids[:, start:stop], mask.k_ids)
    return mask.within(start, 0) if isinstance(mask, Bounded) else mask
