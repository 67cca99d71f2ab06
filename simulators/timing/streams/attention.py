"""Two published attention kernels, unfused and fused, as instruction streams.

Written from their published description: q, k, v [128, S] in HBM, kept in SBUF; scores 128 x 512 in
PSUM. Unfused: scores go to HBM and back before the softmax and again before the second product.
Fused: all of it stays on chip and the division comes last. Products of probabilities are in fp32.
PSUM evictions alternate between VectorE and ScalarE, as in the published profiles.

Letters: M 128 query rows, N 512 keys, J 128 keys.
Source: allenkchau/trainium-kernel-fusion at d709ddf, kernels/ and profiling/.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

ROWS, KEYS = 128, 512


def attention(
    seq_len: int, dtype: str, *, fused: bool, p_dtype: str = "float32", evict: str = "both"
) -> Log:
    """The log for one head of `seq_len` queries and keys, head dim 128.

    p_dtype: dtype of probabilities and v in the second product (the published kernels: float32).
    evict: "both" engines empty PSUM in turn, or "vector" alone does.
    """
    s = Stream()
    q, k, v = (s.load(s.hbm(ROWS, seq_len, dtype=dtype)) for _ in range(3))
    out = s.hbm(seq_len, ROWS, dtype=dtype)
    kernel = _fused if fused else _unfused
    kernel(s, q, k, v, out, Evict(s, p_dtype, evict))
    return s.log


class Evict:
    """Copies PSUM to SBUF on VectorE or ScalarE.

    engines: "both" in turn, one in three on VectorE; "balanced" on the one with less work so far;
    or "vector" or "scalar" alone.
    """

    def __init__(self, s: Stream, p_dtype: str, engines: str) -> None:
        self.s, self.turn, self.p_dtype, self.engines = s, 0, p_dtype, engines

    def __call__(self, dst: Tile, src: Tile) -> None:
        self.turn += 1
        if self._on_vector():
            self.s.vector("tensor_copy", dst, src)
        else:
            self.s.scalar("copy", dst, src)

    def _on_vector(self) -> bool:
        if self.engines == "balanced":
            return self.s.elements["vector"] <= self.s.elements["scalar"]
        return self.engines == "vector" or (self.engines == "both" and self.turn % 3 == 1)


def transposed_blocks(s: Stream, source: Tile, evict: Evict) -> Tile:
    """[128, S] to [128, S / 128, 128] of p_dtype, four transposes to a bank and one copy."""
    blocks = source.shape[1] // ROWS
    result = s.sbuf(ROWS, blocks, ROWS, dtype=evict.p_dtype)
    for first in range(0, blocks, 4):
        bank = s.psum(ROWS, 4, ROWS, dtype=source.dtype)
        for j in range(min(4, blocks - first)):
            column = (first + j) * ROWS
            s.transpose(bank[:, j], source[:, column : column + ROWS])
        evict(result[:, first : first + 4], bank)
    return result


def _scores(s: Stream, q: Tile, k: Tile, m: int, part: slice) -> Tile:
    bank = s.psum(ROWS, KEYS)
    s.matmul(bank, q[:, m * ROWS : (m + 1) * ROWS], k[:, part])
    return bank


def _softmax(s: Stream, tiles: list[Tile], out: Tile) -> Tile:
    """exp(s - max) of all tiles into `out`; returns the row sums [128, 1]."""
    count = len(tiles)
    partial = s.sbuf(ROWS, count, dtype="float32")
    sums = s.sbuf(ROWS, count, dtype="float32")
    top, total = s.sbuf(ROWS, 1, dtype="float32"), s.sbuf(ROWS, 1, dtype="float32")
    for j, tile in enumerate(tiles):
        s.vector("tensor_reduce", partial[:, j : j + 1], tile)
    s.vector("tensor_reduce", top, partial)
    for j, tile in enumerate(tiles):
        part = out[:, j * KEYS : (j + 1) * KEYS]
        s.scalar("exp", part, tile, top)
        s.vector("tensor_reduce", sums[:, j : j + 1], part)
    s.vector("tensor_reduce", total, sums)
    inverse = s.sbuf(ROWS, 1, dtype="float32")
    s.vector("reciprocal", inverse, total)
    return inverse


def _product(s: Stream, p: Tile, v_blocks: Tile, evict: Evict) -> Tile:
    p_blocks = transposed_blocks(s, p, evict)
    acc = s.psum(ROWS, ROWS)
    for j in range(p_blocks.shape[1]):
        s.matmul(acc, p_blocks[:, j], v_blocks[:, j], add=j > 0)
    return acc


def _fused(s: Stream, q: Tile, k: Tile, v: Tile, out: Tile, evict: Evict) -> None:
    seq_len = q.shape[1]
    v_blocks = transposed_blocks(s, v, evict)
    parts = [slice(j, j + KEYS) for j in range(0, seq_len, KEYS)]
    for m in range(seq_len // ROWS):
        tiles = [_scores(s, q, k, m, part) for part in parts]
        if len(tiles) > 4:  # more than half of PSUM: keep them in SBUF
            tiles = [_kept(s, tile, evict) for tile in tiles]
        p = s.sbuf(ROWS, seq_len, dtype=evict.p_dtype)
        inverse = _softmax(s, tiles, p)
        acc = _product(s, p, v_blocks, evict)
        result = s.sbuf(ROWS, ROWS, dtype="float32")
        s.vector("tensor_scalar", result, acc, inverse)
        s.dma(out[m * ROWS : (m + 1) * ROWS], result, "swdge")


def _kept(s: Stream, tile: Tile, evict: Evict) -> Tile:
    kept = s.sbuf(*tile.shape, dtype="float32")
    evict(kept, tile)
    return kept


def _unfused(s: Stream, q: Tile, k: Tile, v: Tile, out: Tile, evict: Evict) -> None:
    seq_len = q.shape[1]
    blocks = seq_len // ROWS
    parts = [slice(j, j + KEYS) for j in range(0, seq_len, KEYS)]
    scores, weights = (s.hbm(seq_len, seq_len, dtype="float32") for _ in range(2))
    rows = [slice(m * ROWS, (m + 1) * ROWS) for m in range(blocks)]
    for m in range(blocks):
        row = s.sbuf(ROWS, seq_len, dtype="float32")
        for part in parts:
            evict(row[:, part], _scores(s, q, k, m, part))
        s.dma(scores[rows[m]], row)
    for m in range(blocks):
        row = s.load(scores[rows[m]])
        p = s.sbuf(ROWS, seq_len, dtype="float32")
        inverse = _softmax(s, [row[:, part] for part in parts], p)
        weight = s.sbuf(ROWS, seq_len, dtype="float32")
        for part in parts:
            s.vector("tensor_scalar", weight[:, part], p[:, part], inverse)
        s.dma(weights[rows[m]], weight)
    v_blocks = transposed_blocks(s, v, evict)
    for m in range(blocks):
        acc = _product(s, s.load(weights[rows[m]]), v_blocks, evict)
        result = s.sbuf(ROWS, ROWS, dtype="float32")
        s.vector("tensor_copy", result, acc)
        s.dma(out[m * ROWS : (m + 1) * ROWS], result)
