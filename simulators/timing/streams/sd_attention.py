"""Steps 1 and 6 of a published tuning run of a diffusion model's attention on trn1.

q, k, v [S, D] in HBM in bf16; q and k come in transposed, here by a load, a transpose on TensorE
and a copy per 128 rows (the source leaves the way to the compiler). Per 128 query rows: scores
128 x 128 copied to SBUF, their row maxima, one exp over the whole row with its sum, 128 x 128
transposes of the weights, second product. Copies out of PSUM go to whichever of VectorE and ScalarE
has less work so far, where the source names no engine. Step 1 keeps scores in fp32, multiplies by
the weights' transpose as the moving operand and divides by a transposed tile; step 6 keeps them in
bf16 and divides while it copies.
Source: ucb-bar/autocomp, examples/trn-tutorial/5_sd_attention_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .attention import Evict
from .builder import Stream, Tile

ROWS = 128
WIDE = {"dtype": "float32"}


def sd_attention(step: int, seq_len: int = 4096, dtype: str = "float32") -> Log:
    """The log of step 1 or 6, inputs in `dtype`; ValueError for another step."""
    if step not in (1, 6):
        raise ValueError(f"step: expected 1 or 6, got {step!r}")
    s = Stream()
    evict = Evict(s, "bfloat16", "balanced")
    q, k, v, out = (s.hbm(seq_len, ROWS, dtype=dtype) for _ in range(4))
    starts = range(0, seq_len, ROWS)
    v_tiles = [s.load(v[start : start + ROWS], dtype="bfloat16") for start in starts]
    q_tiles = [
        _scaled(s, _transposed(s, s.load(q[start : start + ROWS]), evict)) for start in starts
    ]
    k_tiles = [_transposed(s, s.load(k[start : start + ROWS]), evict) for start in starts]
    rows = _rows_of_step_1 if step == 1 else _rows_of_step_6
    for q_tile, start in zip(q_tiles, starts, strict=True):
        rows(s, q_tile, k_tiles, v_tiles, out[start : start + ROWS], evict)
    return s.log


def _scaled(s: Stream, tile: Tile) -> Tile:
    result = s.sbuf(*tile.shape)
    s.vector("tensor_scalar", result, tile)
    return result


def _transposed(s: Stream, data: Tile, evict: Evict) -> Tile:
    bank, tile = s.psum(ROWS, ROWS, dtype=data.dtype), s.sbuf(ROWS, ROWS)
    s.transpose(bank, data)
    evict(tile, bank)
    return tile


def _weights(
    s: Stream, q: Tile, k_tiles: list[Tile], dtype: str, evict: Evict
) -> tuple[Tile, Tile]:
    """exp of all scores of 128 rows, in bf16, and their inverse sums [128, 1]."""
    width = len(k_tiles) * ROWS
    scores, partial = s.sbuf(ROWS, width, dtype=dtype), s.sbuf(ROWS, len(k_tiles), **WIDE)
    for j, k_tile in enumerate(k_tiles):
        bank, mine = s.psum(ROWS, ROWS), scores[:, j * ROWS : (j + 1) * ROWS]
        s.matmul(bank, q, k_tile)
        evict(mine, bank)
        s.vector("tensor_reduce", partial[:, j : j + 1], mine)
    top, total, inverse = (s.sbuf(ROWS, 1, **WIDE) for _ in range(3))
    s.vector("tensor_reduce", top, partial)
    weights = s.sbuf(ROWS, width)
    s.scalar("exp", weights, scores, top, total, read=True)
    s.vector("reciprocal", inverse, total)
    return weights, inverse


def _rows_of_step_1(
    s: Stream, q: Tile, k_tiles: list[Tile], v_tiles: list[Tile], out: Tile, evict: Evict
) -> None:
    weights, inverse = _weights(s, q, k_tiles, "float32", evict)
    divisor = s.sbuf(ROWS, ROWS, **WIDE)
    s.vector("tensor_copy", divisor, inverse)
    acc = s.psum(ROWS, ROWS)
    for j, v_tile in enumerate(v_tiles):
        turned = _transposed(s, weights[:, j * ROWS : (j + 1) * ROWS], evict)
        s.matmul(acc, v_tile, turned, add=j > 0)
    kept, result, factors = (s.sbuf(ROWS, ROWS, **WIDE) for _ in range(3))
    evict(kept, acc)
    bank = s.psum(ROWS, ROWS)
    s.transpose(bank, divisor)
    evict(factors, bank)
    s.vector("tensor_tensor", result, kept, factors)
    s.dma(out, result)


def _rows_of_step_6(
    s: Stream, q: Tile, k_tiles: list[Tile], v_tiles: list[Tile], out: Tile, evict: Evict
) -> None:
    weights, inverse = _weights(s, q, k_tiles, "bfloat16", evict)
    acc = s.psum(ROWS, ROWS)
    for j, v_tile in enumerate(v_tiles):
        turned = _transposed(s, weights[:, j * ROWS : (j + 1) * ROWS], evict)
        s.matmul(acc, turned, v_tile, add=j > 0)
    result = s.sbuf(ROWS, ROWS, dtype=out.dtype)
    s.vector("tensor_scalar", result, acc, inverse)
    s.dma(out, result)
