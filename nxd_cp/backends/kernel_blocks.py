"""How a rectangle of scores becomes launches of the kernels that fit: integers and slices only.

Does: cut heads, rows and keys until one launch fits (`kernel_limits.fits`), and list the launches
with the mask of each. Does not: touch tensors. Launches that share rows run in order, each taking
the result of the one before as its carry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from nxd_cp.backends.kernel_limits import (
    MAX_INSTRUCTIONS,
    ROWS,
    WIDTH,
    Launch,
    backward_instructions,
    fits,
    forward_instructions,
)


@dataclass(frozen=True)
class Block:
    """One launch. groups: (batch, key/value head) pairs, flattened; heads: within a group."""

    groups: slice
    heads: slice
    rows: slice
    keys: slice
    mask: str

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """Where it lies in a tensor [pairs, heads, rows, ...]."""
        return self.groups, self.heads, self.rows

    @property
    def key_rows(self) -> tuple[slice, slice, slice]:
        """Where it lies in a tensor [pairs, 1, keys, ...]."""
        return self.groups, slice(None), self.keys

    @property
    def corner(self) -> tuple[int, int, int]:
        """Where its rows begin: blocks with the same corner have the same rows."""
        return self.groups.start, self.heads.start, self.rows.start


def split(launch: Launch, num_groups: int, group_multiple: int = 1) -> list[Block]:
    """Blocks of a rectangle, those of the same rows together and in the order of their keys.

    launch: the whole rectangle, for one (batch, key/value head) pair. num_groups: such pairs.
    group_multiple: pairs per launch come in multiples of this (two cores share them).
    """
    cut = cut_to_fit(launch)
    length = max(forward_instructions(cut), backward_instructions(cut))
    per_launch = max(1, MAX_INSTRUCTIONS // length // group_multiple) * group_multiple
    return [
        Block(groups, heads, rows, keys, mask)
        for groups in pieces(num_groups, per_launch)
        for heads in pieces(launch.heads, cut.heads)
        for rows in pieces(launch.rows, cut.rows)
        for keys, mask in _visible_keys(launch, rows, cut.keys)
    ]


def cut_to_fit(launch: Launch) -> Launch:
    """The launch halved in rows, keys or heads until it fits; static masks stay square."""
    square = launch.mask in ("causal", "strict")
    while not fits(launch):
        long_rows, long_keys = launch.rows > ROWS, launch.keys > WIDTH
        if square and long_rows:
            half = _half(launch.rows)
            launch = replace(launch, rows=half, keys=half)
        elif long_keys and launch.keys >= launch.units * ROWS:
            launch = replace(launch, keys=_half(launch.keys))
        elif long_rows and launch.rows >= launch.heads:
            launch = replace(launch, rows=_half(launch.rows))
        elif launch.heads > 1:
            launch = replace(launch, heads=ceil(launch.heads / 2))
        else:
            launch = replace(launch, keys=_half(launch.keys))
    return launch


def pieces(total: int, size: int) -> list[slice]:
    """`total` cut into slices of `size`, the last one shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _half(length: int) -> int:
    """Half of a length, rounded up to whole tiles."""
    return ceil(length / 2 / ROWS) * ROWS


def _visible_keys(launch: Launch, rows: slice, size: int) -> Iterator[tuple[slice, str]]:
    """The key slices that these rows can see, and the mask in each."""
    static = launch.mask in ("causal", "strict")
    for keys in pieces(launch.keys, size):
        if not static:
            yield keys, launch.mask
        elif keys.start < rows.start:
            yield keys, "full"
        elif keys.start == rows.start:
            yield keys, launch.mask
