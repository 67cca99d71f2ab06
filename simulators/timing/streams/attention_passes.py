"""Attention in three passes over the keys, all in fp32 and on chip, as an instruction stream.

Scores are computed three times, 128 x 512 in PSUM, as transposing multiplications. For the output,
weights and v are transposed 128 x 128 and v again for every 128 query rows, as written.
Source: ucb-bar/autocomp, examples/trn-tutorial/4_attention_trace.py, fourth step.
"""

from __future__ import annotations

from .attention import KEYS, ROWS, Evict
from .builder import Stream, Tile

WIDE = {"dtype": "float32"}


def three_passes(s: Stream, q: Tile, k: Tile) -> None:
    """Append the stream for q and k in SBUF; v is loaded, the output stored."""
    length = q.shape[1]
    v = s.load(s.hbm(ROWS, length, **WIDE))
    out = s.hbm(length, ROWS, **WIDE)
    rows = [slice(start, start + ROWS) for start in range(0, length, ROWS)]
    parts = [k[:, start : start + KEYS] for start in range(0, length, KEYS)]
    tops = [_maximum(s, q[:, row], parts) for row in rows]
    inverses = [_inverse_sum(s, q[:, row], parts, top) for row, top in zip(rows, tops, strict=True)]
    evict = Evict(s, "float32", "balanced")
    for row, top, inverse in zip(rows, tops, inverses, strict=True):
        acc = s.psum(ROWS, ROWS)
        for j, part in enumerate(parts):
            weights = _exp(s, _scores(s, q[:, row], part), top)
            scaled = s.sbuf(ROWS, KEYS, **WIDE)
            s.vector("tensor_scalar", scaled, weights, inverse)
            for column in range(0, KEYS, ROWS):
                turned = _transposed(s, scaled[:, column : column + ROWS], evict)
                first = j * KEYS + column
                v_turned = _transposed(s, v[:, first : first + ROWS], evict)
                s.matmul(acc, turned, v_turned, add=first > 0)
        result = s.sbuf(ROWS, ROWS, **WIDE)
        evict(result, acc)
        s.dma(out[row], result)


def _scores(s: Stream, q: Tile, k: Tile) -> Tile:
    bank = s.psum(ROWS, KEYS)
    s.matmul(bank, q, k)
    return bank


def _exp(s: Stream, scores: Tile, top: Tile) -> Tile:
    weights = s.sbuf(ROWS, KEYS, **WIDE)
    s.scalar("exp", weights, scores, top)
    return weights


def _transposed(s: Stream, data: Tile, evict: Evict) -> Tile:
    bank, block = s.psum(ROWS, ROWS), s.sbuf(ROWS, ROWS, **WIDE)
    s.transpose(bank, data)
    evict(block, bank)
    return block


def _maximum(s: Stream, q: Tile, parts: list[Tile]) -> Tile:
    total = s.sbuf(ROWS, 1, **WIDE)
    for j, part in enumerate(parts):
        mine = s.sbuf(ROWS, 1, **WIDE)
        s.vector("tensor_reduce", mine, _scores(s, q, part))
        _update(s, total, mine, j)
    return total


def _inverse_sum(s: Stream, q: Tile, parts: list[Tile], top: Tile) -> Tile:
    total, inverse = s.sbuf(ROWS, 1, **WIDE), s.sbuf(ROWS, 1, **WIDE)
    for j, part in enumerate(parts):
        mine = s.sbuf(ROWS, 1, **WIDE)
        s.vector("tensor_reduce", mine, _exp(s, _scores(s, q, part), top))
        _update(s, total, mine, j)
    s.vector("reciprocal", inverse, total)
    return inverse


def _update(s: Stream, total: Tile, mine: Tile, index: int) -> None:
    if index == 0:
        s.vector("tensor_copy", total, mine)
    else:
        s.vector("tensor_tensor", total, total, mine)
