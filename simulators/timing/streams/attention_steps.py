"""Five steps of a published tuning run of attention on trn1, as instruction streams.

Head dim 128, q and k in fp32. Step 0 does one thing at a time for all rows and keeps what comes
between in HBM, all in fp32; step 1 takes the sums with the exp. Step 3 stays on chip in fp32 and
goes over the keys three times, for the maximum, the sum and the output (attention_passes.py).
Steps 7 and 8 have probabilities and v in bf16; per 128 query rows:
scores 128 x 512 and their row maximum; then per 128 keys exp, row sum, transpose and the second
product. Step 8 keeps the scores in SBUF as bf16 in between; step 7 computes them again, 128 columns
at a time.
PSUM evictions go to whichever of VectorE and ScalarE has less work so far.
Source: ucb-bar/autocomp, examples/trn-tutorial/4_attention_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .attention import KEYS, ROWS, Evict
from .attention_passes import three_passes
from .builder import Stream, Tile

STEPS = (0, 1, 3, 7, 8)


def attention_step(step: int, seq_len: int = 4096) -> Log:
    """The log of step 0, 1, 3, 7 or 8; ValueError for another."""
    if step not in STEPS:
        raise ValueError(f"step: expected one of {', '.join(map(str, STEPS))}, got {step!r}")
    s = Stream()
    q, k = (s.load(s.hbm(ROWS, seq_len, dtype="float32")) for _ in range(2))
    if step in (0, 1):
        _through_hbm(s, q, k, sums_with_exp=step == 1)
        return s.log
    if step == 3:
        three_passes(s, q, k)
        return s.log
    evict = Evict(s, "bfloat16", "balanced")
    v = s.hbm(ROWS, seq_len, dtype="float32")
    v_blocks = [
        _transposed(s, s.load(v[:, start : start + ROWS]), evict)
        for start in range(0, seq_len, ROWS)
    ]
    out = s.hbm(seq_len, ROWS, dtype="float32")
    for row in range(0, seq_len, ROWS):
        _rows(s, q[:, row : row + ROWS], k, v_blocks, out[row : row + ROWS], evict, step == 8)
    return s.log


def _through_hbm(s: Stream, q: Tile, k: Tile, *, sums_with_exp: bool) -> None:
    """Steps 0 and 1: scores less their maximum, exp, sums, division, transposes, second product."""
    length, wide = q.shape[1], {"dtype": "float32"}
    blocks = range(length // ROWS)
    shifted, weights, scores = ([s.hbm(ROWS, length, **wide) for _ in blocks] for _ in range(3))
    for m in blocks:
        banks = [s.psum(ROWS, KEYS) for _ in range(length // KEYS)]
        partial, top = s.sbuf(ROWS, len(banks), **wide), s.sbuf(ROWS, 1, **wide)
        row = s.sbuf(ROWS, length, **wide)
        for j, bank in enumerate(banks):
            s.matmul(bank, q[:, m * ROWS : (m + 1) * ROWS], k[:, j * KEYS : (j + 1) * KEYS])
            s.vector("tensor_reduce", partial[:, j : j + 1], bank)
        s.vector("tensor_reduce", top, partial)
        for j, bank in enumerate(banks):
            s.vector("tensor_scalar", row[:, j * KEYS : (j + 1) * KEYS], bank, top)
        s.dma(shifted[m], row)
    sums, inverse = s.sbuf(ROWS, len(blocks), **wide), s.sbuf(ROWS, len(blocks), **wide)
    for m in blocks:
        row = s.sbuf(ROWS, length, **wide)
        extra = [sums[:, m : m + 1]] if sums_with_exp else []
        s.scalar("exp", row, s.load(shifted[m]), *extra, read=sums_with_exp)
        s.dma(weights[m], row)
    if not sums_with_exp:
        for m in blocks:
            s.vector("tensor_reduce", sums[:, m : m + 1], s.load(weights[m]))
    s.vector("reciprocal", inverse, sums)
    for m in blocks:
        row = s.sbuf(ROWS, length, **wide)
        s.vector("tensor_scalar", row, s.load(weights[m]), inverse[:, m : m + 1])
        s.dma(scores[m], row)
    _second_product(s, scores)


def _second_product(s: Stream, scores: list[Tile]) -> None:
    """Steps 0 and 1: v and the scores are transposed through HBM, then multiplied."""
    blocks, wide = range(len(scores)), {"dtype": "float32"}
    evict = Evict(s, "float32", "scalar")
    v = s.load(s.hbm(ROWS, len(scores) * ROWS, **wide))
    v_blocks = [s.hbm(ROWS, ROWS, **wide) for _ in blocks]
    for j in blocks:
        s.dma(v_blocks[j], _transposed(s, v[:, j * ROWS : (j + 1) * ROWS], evict))
    turned = [[s.hbm(ROWS, ROWS, **wide) for _ in blocks] for _ in blocks]
    for m in blocks:
        for j in blocks:
            block = s.load(scores[m][:, j * ROWS : (j + 1) * ROWS])
            s.dma(turned[m][j], _transposed(s, block, evict))
    for m in blocks:
        acc, result = s.psum(ROWS, ROWS), s.sbuf(ROWS, ROWS, **wide)
        for j in blocks:
            p_block = s.load(turned[m][j])
            v_block = s.load(v_blocks[j])
            s.matmul(acc, p_block, v_block, add=j > 0)
        s.scalar("copy", result, acc)
        s.dma(s.hbm(ROWS, ROWS, **wide), result)


def _transposed(s: Stream, data: Tile, evict: Evict) -> Tile:
    bank = s.psum(ROWS, ROWS, dtype=data.dtype)
    block = s.sbuf(ROWS, ROWS, dtype=evict.p_dtype)
    s.transpose(bank, data)
    evict(block, bank)
    return block


def _rows(
    s: Stream, q: Tile, k: Tile, v_blocks: list[Tile], out: Tile, evict: Evict, keep: bool
) -> None:
    """128 query rows over all keys."""
    count = k.shape[1] // KEYS
    partial = s.sbuf(ROWS, count, dtype="float32")
    kept = []
    for j in range(count):
        bank = s.psum(ROWS, KEYS)
        s.matmul(bank, q, k[:, j * KEYS : (j + 1) * KEYS])
        s.vector("tensor_reduce", partial[:, j : j + 1], bank)
        if keep:
            kept.append(s.sbuf(ROWS, KEYS))
            s.vector("tensor_copy", kept[-1], bank)
    top, total = s.sbuf(ROWS, 1, dtype="float32"), s.sbuf(ROWS, 1, dtype="float32")
    s.vector("tensor_reduce", top, partial)
    sums = s.sbuf(ROWS, len(v_blocks), dtype="float32")
    acc = s.psum(ROWS, ROWS)
    for column, v_block in enumerate(v_blocks):
        if keep:
            start = column * ROWS % KEYS
            scores = kept[column * ROWS // KEYS][:, start : start + ROWS]
        else:
            scores = s.psum(ROWS, ROWS)
            s.matmul(scores, q, k[:, column * ROWS : (column + 1) * ROWS])
        p = s.sbuf(ROWS, ROWS)
        s.scalar("exp", p, scores, top)
        s.vector("tensor_reduce", sums[:, column : column + 1], p)
        s.matmul(acc, _transposed(s, p, evict), v_block, add=column > 0)
    s.vector("tensor_reduce", total, sums)
    inverse, result = s.sbuf(ROWS, 1, dtype="float32"), s.sbuf(ROWS, ROWS, dtype="float32")
    s.vector("reciprocal", inverse, total)
    s.vector("tensor_scalar", result, acc, inverse)
    s.dma(out, result)
