"""Five steps of a published tuning run of attention on trn1, as instruction streams.

Head dim 128, q and k in fp32. Step 0 does one thing at a time for all rows and keeps what comes
between in HBM, all in fp32; step 1 takes the sums with the exp. Steps 3 and 7 stay on chip and go
over the keys three times (attention_passes.py). Step 8 has probabilities and v in bf16; per 128
query rows: scores 128 x 512, their row maximum and a copy in bf16; then exp, row sums, transposes
and the second product.
What loops of 128 columns do is one instruction per 512: affine_loops in docs/timing.md.
PSUM evictions go to whichever of VectorE and ScalarE has less work so far.
Source: ucb-bar/autocomp, examples/trn-tutorial/4_attention_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .attention import KEYS, ROWS, Evict, transposed_blocks
from .attention_passes import three_passes
from .builder import Stream, Tile

STEPS = (0, 1, 3, 7, 8)
WIDE = {"dtype": "float32"}


def attention_step(step: int, seq_len: int = 4096) -> Log:
    """The log of step 0, 1, 3, 7 or 8; ValueError for another."""
    if step not in STEPS:
        raise ValueError(f"step: expected one of {', '.join(map(str, STEPS))}, got {step!r}")
    s = Stream()
    q, k = (s.load(s.hbm(ROWS, seq_len, **WIDE)) for _ in range(2))
    if step in (0, 1):
        _through_hbm(s, q, k, sums_with_exp=step == 1)
    elif step in (3, 7):
        three_passes(s, q, k, p_dtype="float32" if step == 3 else "bfloat16")
    else:
        _kept_scores(s, q, k)
    return s.log


def _through_hbm(s: Stream, q: Tile, k: Tile, *, sums_with_exp: bool) -> None:
    """Steps 0 and 1: scores less their maximum, exp, sums, division, transposes, second product."""
    length = q.shape[1]
    rows = [slice(start, start + ROWS) for start in range(0, length, ROWS)]
    shifted, weights, scores = (s.hbm(length, length, **WIDE) for _ in range(3))
    for row in rows:
        banks = [s.psum(ROWS, KEYS) for _ in range(length // KEYS)]
        partial, top = s.sbuf(ROWS, len(banks), **WIDE), s.sbuf(ROWS, 1, **WIDE)
        kept = s.sbuf(ROWS, length, **WIDE)
        for j, bank in enumerate(banks):
            s.matmul(bank, q[:, row], k[:, j * KEYS : (j + 1) * KEYS])
            s.vector("tensor_reduce", partial[:, j : j + 1], bank)
        s.vector("tensor_reduce", top, partial)
        for j, bank in enumerate(banks):
            s.vector("tensor_scalar", kept[:, j * KEYS : (j + 1) * KEYS], bank, top)
        s.dma(shifted[row], kept)
    sums, inverse = s.sbuf(ROWS, len(rows), **WIDE), s.sbuf(ROWS, len(rows), **WIDE)
    for m, row in enumerate(rows):
        kept = s.sbuf(ROWS, length, **WIDE)
        extra = [sums[:, m : m + 1]] if sums_with_exp else []
        s.scalar("exp", kept, s.load(shifted[row]), *extra, read=sums_with_exp)
        s.dma(weights[row], kept)
    if not sums_with_exp:
        for m, row in enumerate(rows):
            s.vector("tensor_reduce", sums[:, m : m + 1], s.load(weights[row]))
    s.vector("reciprocal", inverse, sums)
    for m, row in enumerate(rows):
        kept = s.sbuf(ROWS, length, **WIDE)
        s.vector("tensor_scalar", kept, s.load(weights[row]), inverse[:, m : m + 1])
        s.dma(scores[row], kept)
    _second_product(s, scores, rows)


def _second_product(s: Stream, scores: Tile, rows: list[slice]) -> None:
    """Steps 0 and 1: v and the scores are transposed through HBM, then multiplied."""
    length = scores.shape[1]
    evict = Evict(s, "float32", "balanced")
    v, parts = s.load(s.hbm(ROWS, length, **WIDE)), range(0, length, KEYS)
    v_blocks = _blocks(s, length, ROWS)
    for j in parts:
        s.dma(_four(v_blocks, j, 0), transposed_blocks(s, v[:, j : j + KEYS], evict))
    turned = _blocks(s, length, length)
    for row in rows:
        for j in parts:
            part = s.load(scores[row, j : j + KEYS])
            s.dma(_four(turned, j, row.start), transposed_blocks(s, part, evict))
    out = s.hbm(length, ROWS, **WIDE)
    for row in rows:
        acc, result = s.psum(ROWS, ROWS), s.sbuf(ROWS, ROWS, **WIDE)
        for j in parts:
            p_tile, v_tile = s.load(_four(turned, j, row.start)), s.load(_four(v_blocks, j, 0))
            for block in range(KEYS // ROWS):
                s.matmul(acc, p_tile[:, block], v_tile[:, block], add=j + block > 0)
        evict(result, acc)
        s.dma(out[row], result)


def _blocks(s: Stream, keys: int, columns: int) -> Tile:
    """Blocks of 128 x 128 in HBM, each in one piece: [keys / 128, columns, 128]."""
    return s.hbm(keys // ROWS, columns, ROWS, **WIDE)


def _four(blocks: Tile, key: int, column: int) -> Tile:
    """Four blocks under each other, as [128, 4, 128]."""
    first = key // ROWS
    return blocks[first : first + KEYS // ROWS, column : column + ROWS].swapped()


def _kept_scores(s: Stream, q: Tile, k: Tile) -> None:
    """Step 8: scores stay in SBUF, in bf16."""
    length = q.shape[1]
    evict = Evict(s, "bfloat16", "balanced")
    v, out = s.hbm(ROWS, length, **WIDE), s.hbm(length, ROWS, **WIDE)
    v_blocks = [
        transposed_blocks(s, s.load(v[:, start : start + KEYS]), evict)
        for start in range(0, length, KEYS)
    ]
    for row in range(0, length, ROWS):
        _rows(s, q[:, row : row + ROWS], k, v_blocks, out[row : row + ROWS], evict)


def _rows(s: Stream, q: Tile, k: Tile, v_blocks: list[Tile], out: Tile, evict: Evict) -> None:
    """128 query rows over all keys."""
    count = len(v_blocks)
    partial, sums = s.sbuf(ROWS, count, **WIDE), s.sbuf(ROWS, count * KEYS // ROWS, **WIDE)
    kept = []
    for j in range(count):
        bank = s.psum(ROWS, KEYS)
        s.matmul(bank, q, k[:, j * KEYS : (j + 1) * KEYS], onezero=True)
        s.vector("tensor_reduce", partial[:, j : j + 1], bank)
        kept.append(s.sbuf(ROWS, KEYS))
        s.vector("tensor_copy", kept[-1], bank)
    top, total = s.sbuf(ROWS, 1, **WIDE), s.sbuf(ROWS, 1, **WIDE)
    s.vector("tensor_reduce", top, partial)
    acc = s.psum(ROWS, ROWS)
    for j, v_part in enumerate(v_blocks):
        p = s.sbuf(ROWS, KEYS)
        s.scalar("exp", p, kept[j], top)
        s.vector("tensor_reduce", sums[:, 4 * j : 4 * j + 4], p)
        p_blocks = transposed_blocks(s, p, evict)
        for block in range(KEYS // ROWS):
            s.matmul(acc, p_blocks[:, block], v_part[:, block], add=j + block > 0)
    s.vector("tensor_reduce", total, sums)
    inverse, result = s.sbuf(ROWS, 1, **WIDE), s.sbuf(ROWS, ROWS, **WIDE)
    s.vector("reciprocal", inverse, total)
    s.vector("tensor_scalar", result, acc, inverse)
    s.dma(out, result)
