"""Attention in three passes over the keys, on chip, as an instruction stream.

Scores are computed three times, 128 x 512 in PSUM, as multiplications marked as transposes: for the
row maxima and for the sums one block of keys after the other, and for the output. There weights and
v are transposed, v again for every 128 query rows, as written. With weights in bf16 the sums come
out of the exp, and v is cast before it is transposed.
Source: ucb-bar/autocomp, examples/trn-tutorial/4_attention_trace.py, fourth and eighth kernel.
"""

from __future__ import annotations

from .attention import KEYS, ROWS, Evict, transposed_blocks
from .builder import Stream, Tile

WIDE = {"dtype": "float32"}


def three_passes(s: Stream, q: Tile, k: Tile, *, p_dtype: str) -> None:
    """Append the stream for q and k in SBUF; v is loaded, the output stored."""
    length = q.shape[1]
    v = s.load(s.hbm(ROWS, length, **WIDE))
    out = s.hbm(length, ROWS, **WIDE)
    rows = [slice(start, start + ROWS) for start in range(0, length, ROWS)]
    parts = [k[:, start : start + KEYS] for start in range(0, length, KEYS)]
    tops = [_maximum(s, q[:, row], parts) for row in rows]
    sums = s.sbuf(ROWS, len(rows), **WIDE)
    for i, row in enumerate(rows):
        total = sums[:, i : i + 1]
        if p_dtype == "float32":
            _sum(s, q[:, row], parts, tops[i], total)
        else:
            _sum_with_exp(s, q[:, row], parts, tops[i], total)
    inverses = s.sbuf(ROWS, len(rows), **WIDE)
    s.vector("reciprocal", inverses, sums)
    evict = Evict(s, p_dtype, "balanced")
    for i, row in enumerate(rows):
        acc = s.psum(ROWS, ROWS)
        for j, part in enumerate(parts):
            weights, scaled = s.sbuf(ROWS, KEYS, dtype=p_dtype), s.sbuf(ROWS, KEYS, dtype=p_dtype)
            s.scalar("exp", weights, _scores(s, q[:, row], part), tops[i])
            s.vector("tensor_scalar", scaled, weights, inverses[:, i : i + 1])
            v_part = v[:, j * KEYS : (j + 1) * KEYS]
            if p_dtype != "float32":
                cast = s.sbuf(ROWS, KEYS, dtype=p_dtype)
                s.vector("tensor_copy", cast, v_part)
                v_part = cast
            turned = transposed_blocks(s, scaled, evict)
            v_turned = transposed_blocks(s, v_part, evict)
            for block in range(KEYS // ROWS):
                s.matmul(acc, turned[:, block], v_turned[:, block], add=j + block > 0)
        result = s.sbuf(ROWS, ROWS, dtype=p_dtype)
        evict(result, acc)
        s.dma(out[row], result)


def _scores(s: Stream, q: Tile, k: Tile) -> Tile:
    bank = s.psum(ROWS, KEYS)
    s.matmul(bank, q, k, onezero=True)
    return bank


def _maximum(s: Stream, q: Tile, parts: list[Tile]) -> Tile:
    total = s.sbuf(ROWS, 1, **WIDE)
    for j, part in enumerate(parts):
        mine = s.sbuf(ROWS, 1, **WIDE)
        s.vector("tensor_reduce", mine, _scores(s, q, part))
        _update(s, total, mine, j)
    return total


def _sum(s: Stream, q: Tile, parts: list[Tile], top: Tile, total: Tile) -> None:
    """Sums of exp, taken by VectorE."""
    for j, part in enumerate(parts):
        weights, mine = s.sbuf(ROWS, KEYS, **WIDE), s.sbuf(ROWS, 1, **WIDE)
        s.scalar("exp", weights, _scores(s, q, part), top)
        s.vector("tensor_reduce", mine, weights)
        _update(s, total, mine, j)


def _sum_with_exp(s: Stream, q: Tile, parts: list[Tile], top: Tile, total: Tile) -> None:
    """Sums of exp, kept by ScalarE and read with the last block."""
    mine = s.sbuf(ROWS, 1, **WIDE)
    for part in parts[:-1]:
        s.scalar("exp", s.sbuf(ROWS, KEYS, **WIDE), _scores(s, q, part), top)
    weights = s.sbuf(ROWS, KEYS, **WIDE)
    s.scalar("exp", weights, _scores(s, q, parts[-1]), top, mine, read=True)
    s.vector("tensor_copy", total, mine)


def _update(s: Stream, total: Tile, mine: Tile, index: int) -> None:
    if index == 0:
        s.vector("tensor_copy", total, mine)
    else:
        s.vector("tensor_tensor", total, total, mine)
