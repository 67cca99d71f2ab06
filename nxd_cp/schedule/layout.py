"""Who holds which tokens: the three layouts as runs of global positions.

Does: cut a sequence into runs, also one that no number of ranks divides. Does not: know masks.

Note [Padding]
    Every rank holds equally many slots. When a sequence does not fill them, the last slots of the
    whole (padded) sequence hold no token. Runs ascend, so on every rank the tokens come first and
    the padding last, in every layout; a rank may hold nothing but padding.
"""

from __future__ import annotations

from typing import Literal, get_args

Layout = Literal["contiguous", "zigzag", "striped"]

LAYOUTS: tuple[str, ...] = get_args(Layout)


def seq_len_multiple(layout: str, size: int) -> int:
    """The whole sequence, padding included, must be a multiple of this many slots."""
    return 2 * size if layout == "zigzag" and size > 1 else size


def padded_len(layout: str, size: int, num_tokens: int) -> int:
    """The shortest length, in slots, that holds `num_tokens` tokens in this layout."""
    multiple = seq_len_multiple(layout, size)
    return -(-num_tokens // multiple) * multiple


def token_runs(
    layout: str, size: int, rank: int, seq_len: int, num_tokens: int | None = None
) -> tuple[range, ...]:
    """Global positions of the tokens that `rank` holds; local order is their concatenation.

    seq_len: slots of the whole sequence. num_tokens: how many of them hold a token (default all);
    runs end there, and may be empty.
    Raises ValueError for an unknown layout, a rank outside the ring or a length that does not cut.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 <= rank < size, got rank {rank} of {size}")
    multiple = seq_len_multiple(layout, size)
    if seq_len < multiple or seq_len % multiple:
        raise ValueError(
            f"sequence length: expected a positive multiple of {multiple} "
            f"({layout}, {size} ranks), got {seq_len}; pad the batch"
        )
    end = seq_len if num_tokens is None else num_tokens
    if not 0 < end <= seq_len:
        raise ValueError(f"number of tokens: expected 1 to {seq_len} (all slots), got {end}")
    return tuple(
        range(min(run.start, end), min(run.stop, end), run.step)
        for run in _slot_runs(layout, size, rank, seq_len)
    )


def _slot_runs(layout: str, size: int, rank: int, seq_len: int) -> tuple[range, ...]:
    if layout == "striped":
        return (range(rank, seq_len, size),)
    if layout == "contiguous" or size == 1:
        length = seq_len // size
        return (range(rank * length, (rank + 1) * length),)
    half = seq_len // (2 * size)
    mirror = 2 * size - 1 - rank
    return (range(rank * half, (rank + 1) * half), range(mirror * half, (mirror + 1) * half))
