"""The two versions of the layer normalisation tutorial, as instruction streams.

Per 128 rows: version 1 takes the mean, the squares and their mean, version 2 the statistics in
pieces of 512 and their aggregate; then shift and scale in one instruction, times gamma, plus beta.
Squares and roots are ScalarE's, the rest VectorE's; gamma and beta are spread over the partitions
once, by a multiplication with ones.
Source: aws-neuron/nki-samples, tutorials/layernorm (branch doc-update-Jan02), fp32.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

ROWS, BANK = 128, 512
WIDE = {"dtype": "float32"}


def layernorm(version: int, rows: int, columns: int) -> Log:
    """The log of version 1 or 2; rows a multiple of 128, columns of 512."""
    s = Stream()
    source, out = s.hbm(rows, columns, **WIDE), s.hbm(rows, columns, **WIDE)
    ones = s.sbuf(1, ROWS, **WIDE)
    s.vector("memset", ones)
    gamma, beta = (_spread(s, s.load(s.hbm(1, columns, **WIDE)), ones) for _ in range(2))
    for start in range(0, rows, ROWS):
        data = s.load(source[start : start + ROWS])
        mean, scale = _moments(s, data) if version == 1 else _statistics(s, data)
        tiles = [s.sbuf(ROWS, columns, **WIDE) for _ in range(3)]
        s.vector("tensor_scalar", tiles[0], data, mean, scale)
        s.vector("tensor_tensor", tiles[1], tiles[0], gamma)
        s.vector("tensor_tensor", tiles[2], tiles[1], beta)
        s.dma(out[start : start + ROWS], tiles[2])
    return s.log


def _spread(s: Stream, row: Tile, ones: Tile) -> Tile:
    """[1, N] on all partitions."""
    result = s.sbuf(ROWS, row.shape[1], **WIDE)
    for start in range(0, row.shape[1], BANK):
        bank = s.psum(ROWS, BANK)
        s.matmul(bank, ones, row[:, start : start + BANK])
        s.scalar("copy", result[:, start : start + BANK], bank)
    return result


def _moments(s: Stream, data: Tile) -> tuple[Tile, Tile]:
    """Mean and 1 / deviation, by the mean of the squares."""
    squares = s.sbuf(*data.shape, **WIDE)
    mean, second, shift, variance, scale = (s.sbuf(ROWS, 1, **WIDE) for _ in range(5))
    s.vector("tensor_reduce", mean, data)
    s.scalar("square", squares, data)
    s.vector("tensor_reduce", second, squares)
    s.vector("tensor_tensor", shift, mean, mean)
    s.vector("tensor_tensor", variance, second, shift)
    s.scalar("rsqrt", scale, variance)
    return mean, scale


def _statistics(s: Stream, data: Tile) -> tuple[Tile, Tile]:
    """Mean and 1 / deviation, by bn_stats of 512 columns and bn_aggr."""
    pieces = data.shape[1] // BANK
    stats, found, scale = (s.sbuf(ROWS, n, **WIDE) for n in (6 * pieces, 2, 1))
    for piece in range(pieces):
        part = data[:, piece * BANK : (piece + 1) * BANK]
        s.vector("bn_stats", stats[:, 6 * piece : 6 * piece + 6], part)
    s.vector("bn_aggr", found, stats)
    s.scalar("rsqrt", scale, found[:, 1:])
    return found[:, :1], scale
