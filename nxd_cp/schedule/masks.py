"""What is seen: rectangles of scores and the masks inside them.

Does: turn runs of query and key positions into the rectangles that hold every visible pair once.
Does not: know layouts or rings; masks come from runs alone.

Note [Masks come from runs]
    Every layout gives a rank one or two runs with a common stride. A query at place p sees the keys
    from p - left to p + right. Take a query run and a key run with stride t, and let distance be
    q.start - k.start. Row i sees column j exactly when
        i + ceil((distance - left) / t) <= j <= i + floor((distance + right) / t),
    a band. A causal mask has right = 0 and no left end; its high end says what it is: 0 is
    "causal", -1 is "strict", a large one is "full", a small one is nothing at all, and no other
    code needs to know which layout it was. All other bands are "bounded".

Note [The last query sees the last key]
    With more keys than queries, or fewer, the query at position i stands at place i + shift among
    the keys, shift = keys - queries. So queries that follow keys already there see them all; with
    more queries than keys the first queries of a causal mask see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskKind = Literal["full", "causal", "strict"]
Runs = tuple[range, ...]


@dataclass(frozen=True)
class Bounded:
    """A band of a rectangle: row i sees columns i + low to i + high, as far as they exist."""

    low: int
    high: int

    def columns(self, row: int, num_columns: int) -> range:
        """The columns that `row` sees."""
        return range(max(0, row + self.low), min(num_columns, row + self.high + 1))

    def num_pairs(self, num_rows: int, num_columns: int) -> int:
        """Number of visible pairs of a rectangle, in constant time."""

        def sum_to(last: int) -> int:
            """1 + 2 + ... + last, each at most num_columns; 0 where last is not positive."""
            rising = min(max(last, 0), num_columns)
            return rising * (rising + 1) // 2 + max(last - num_columns, 0) * num_columns

        def before(end: int) -> int:
            """Pairs whose column is less than row + end."""
            return sum_to(num_rows - 1 + end) - sum_to(end - 1)

        return max(0, before(self.high + 1) - before(self.low))

    def within(self, first_row: int, first_column: int) -> Bounded:
        """The same band, counted from another corner."""
        shift = first_row - first_column
        return Bounded(self.low + shift, self.high + shift)

    def __str__(self) -> str:
        return f"bounded {self.low:+d}..{self.high:+d}"


Mask = MaskKind | Bounded


@dataclass(frozen=True)
class Tile:
    """One rectangle of scores: local query rows x rows of the visiting keys, and the mask inside.

    "causal": row i sees columns 0..i. "strict": row i sees columns 0..i-1. Both are square.
    """

    q: slice
    k: slice
    mask: Mask

    @property
    def q_len(self) -> int:
        """Number of query rows."""
        return self.q.stop - self.q.start

    @property
    def k_len(self) -> int:
        """Number of key rows."""
        return self.k.stop - self.k.start

    @property
    def num_pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        if isinstance(self.mask, Bounded):
            return self.mask.num_pairs(self.q_len, self.k_len)
        if self.mask == "full":
            return self.q_len * self.k_len
        return self.q_len * (self.q_len + (1 if self.mask == "causal" else -1)) // 2

    def __str__(self) -> str:
        return f"q[{self.q.start}:{self.q.stop}] x k[{self.k.start}:{self.k.stop}] {self.mask}"


@dataclass(frozen=True)
class Sight:
    """What a query sees: keys from `left` before its place to `right` after it; None is all.

    shift: places of queries minus their positions; see Note [The last query sees the last key].
    """

    left: int | None
    right: int | None
    shift: int = 0

    @property
    def is_causal(self) -> bool:
        """Everything before, nothing after."""
        return self.left is None and self.right == 0


def tiles(q_runs: Runs, k_runs: Runs, sight: Sight) -> tuple[Tile, ...]:
    """Rectangles that hold every visible pair of these runs once; as few as there are masks for."""
    q_len, k_len = sum(map(len, q_runs)), sum(map(len, k_runs))
    if not q_len or not k_len:
        return ()
    if sight.left is None and sight.right is None:
        return (Tile(slice(0, q_len), slice(0, k_len), "full"),)
    if sight.is_causal and sight.shift == 0 and q_runs == k_runs:
        return (Tile(slice(0, q_len), slice(0, k_len), "causal"),)  # runs ascend: one triangle
    found: list[Tile] = []
    q_start = 0
    for q_run in q_runs:
        k_start = 0
        row: list[Tile] = []
        for k_run in k_runs:
            tile = _tile(q_run, k_run, q_start, k_start, sight)
            if tile is not None:
                _append_joined(row, tile)
            k_start += len(k_run)
        q_start += len(q_run)
        for tile in row:
            _append_joined(found, tile)
    return tuple(found)


def _tile(q_run: range, k_run: range, q_start: int, k_start: int, sight: Sight) -> Tile | None:
    """The rectangle between two runs that start at these local rows; None when it is empty."""
    assert q_run.step == k_run.step, f"runs of one layout share a stride: {q_run}, {k_run}"
    num_rows, num_columns = len(q_run), len(k_run)
    distance, stride = q_run.start + sight.shift - k_run.start, q_run.step
    low, high = -num_rows, num_columns
    if sight.left is not None:
        low = -((sight.left - distance) // stride)
    if sight.right is not None:
        high = (distance + sight.right) // stride
    if sight.is_causal and high == -1 and num_rows == num_columns > 1:
        return Tile(*_slices(q_start, range(num_rows), k_start, range(num_columns)), "strict")
    rows = range(max(0, -high), min(num_rows, num_columns - low))
    if low > high or not rows or not num_columns:
        return None
    columns = range(max(0, rows.start + low), min(num_columns, rows.stop + high))
    band = Bounded(low, high).within(rows.start, columns.start)
    mask = _simplest(band, len(rows), len(columns))
    return Tile(*_slices(q_start, rows, k_start, columns), mask)


def _slices(q_start: int, rows: range, k_start: int, columns: range) -> tuple[slice, slice]:
    return (
        slice(q_start + rows.start, q_start + rows.stop),
        slice(k_start + columns.start, k_start + columns.stop),
    )


def _simplest(band: Bounded, num_rows: int, num_columns: int) -> Mask:
    """ "full" or "causal" where the band is just that."""
    if num_rows - 1 + band.low > 0:
        return band
    if band.high >= num_columns - 1:
        return "full"
    return "causal" if band.high == 0 and num_rows == num_columns else band


def _append_joined(tiles: list[Tile], new: Tile) -> None:
    """Append `new`, or grow the last tile when both are full and share an edge."""
    if tiles and tiles[-1].mask == new.mask == "full":
        last = tiles[-1]
        if last.q == new.q and last.k.stop == new.k.start:
            tiles[-1] = Tile(new.q, slice(last.k.start, new.k.stop), "full")
            return
        if last.k == new.k and last.q.stop == new.q.start:
            tiles[-1] = Tile(slice(last.q.start, new.q.stop), new.k, "full")
            return
    tiles.append(new)
