"""Steps 1 and 6 of a published tuning run of a diffusion model's attention on trn1.

q, k, v [S, D] in HBM in fp32; q and k come in transposed, here by a load and a transpose on TensorE
per 128 rows (the source leaves the way to the compiler). Per 128 query rows: scores copied to SBUF,
the maxima of every 128, one exp over the whole row with its sum, transposes of the weights, second
product. What loops of 128 columns do is one instruction per 512: affine_loops in docs/timing.md.
Copies out of PSUM go to whichever of VectorE and ScalarE has less work so far, where the source
names no engine. Step 1 keeps scores in fp32, multiplies by the weights' transpose as the moving
operand and divides by a transposed tile; step 6 keeps them in bf16 and divides while it copies.
Source: ucb-bar/autocomp, examples/trn-tutorial/5_sd_attention_trace.py.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .attention import KEYS, ROWS, Evict, transposed_blocks
from .builder import Stream, Tile

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
    q_turned, k_turned = _transposed(s, q, evict, scaled=True), _transposed(s, k, evict)
    rows = _rows_of_step_1 if step == 1 else _rows_of_step_6
    for start in starts:
        row = slice(start, start + ROWS)
        rows(s, q_turned[:, row], k_turned, v_tiles, out[row], evict)
    return s.log


def _transposed(s: Stream, source: Tile, evict: Evict, *, scaled: bool = False) -> Tile:
    """[S, 128] in HBM to [128, S] in SBUF, by 512 rows; `scaled` also multiplies."""
    result = s.sbuf(ROWS, source.shape[0])
    for start in range(0, source.shape[0], KEYS):
        bank, part = s.psum(ROWS, KEYS), result[:, start : start + KEYS]
        for row in range(0, KEYS, ROWS):
            data = s.load(source[start + row : start + row + ROWS])
            s.transpose(bank[:, row : row + ROWS], data)
        evict(part, bank)
        if scaled:
            s.vector("tensor_scalar", part, part)
    return result


def _weights(s: Stream, q: Tile, k: Tile, dtype: str, evict: Evict) -> tuple[Tile, Tile]:
    """exp of all scores of 128 rows, in bf16, and their inverse sums [128, 1]."""
    width, blocks = k.shape[1], KEYS // ROWS
    scores, partial = s.sbuf(ROWS, width, dtype=dtype), s.sbuf(ROWS, width // ROWS, **WIDE)
    for j, start in enumerate(range(0, width, KEYS)):
        bank, mine = s.psum(ROWS, KEYS), scores[:, start : start + KEYS]
        s.matmul(bank, q, k[:, start : start + KEYS])
        evict(mine, bank)
        s.vector("tensor_reduce", partial[:, j * blocks : (j + 1) * blocks], mine)
    top, total, inverse = (s.sbuf(ROWS, 1, **WIDE) for _ in range(3))
    s.vector("tensor_reduce", top, partial)
    weights = s.sbuf(ROWS, width)
    s.scalar("exp", weights, scores, top, total, read=True)
    s.vector("reciprocal", inverse, total)
    return weights, inverse


def _rows_of_step_1(
    s: Stream, q: Tile, k: Tile, v_tiles: list[Tile], out: Tile, evict: Evict
) -> None:
    weights, inverse = _weights(s, q, k, "float32", evict)
    divisor = s.sbuf(ROWS, ROWS, **WIDE)
    s.vector("tensor_copy", divisor, inverse)
    acc = s.psum(ROWS, ROWS)
    turned = transposed_blocks(s, weights, evict)
    for j, v_tile in enumerate(v_tiles):
        s.matmul(acc, v_tile, turned[:, j], add=j > 0)
    kept, result, factors = (s.sbuf(ROWS, ROWS, **WIDE) for _ in range(3))
    evict(kept, acc)
    bank = s.psum(ROWS, ROWS)
    s.transpose(bank, divisor)
    evict(factors, bank)
    s.vector("tensor_tensor", result, kept, factors)
    s.dma(out, result)


def _rows_of_step_6(
    s: Stream, q: Tile, k: Tile, v_tiles: list[Tile], out: Tile, evict: Evict
) -> None:
    weights, inverse = _weights(s, q, k, "bfloat16", evict)
    acc = s.psum(ROWS, ROWS)
    turned = transposed_blocks(s, weights, evict)
    for j, v_tile in enumerate(v_tiles):
        s.matmul(acc, turned[:, j], v_tile, add=j > 0)
    result = s.sbuf(ROWS, ROWS, dtype=out.dtype)
    s.vector("tensor_scalar", result, acc, inverse)
    s.dma(out, result)
