"""The versions of the matrix multiplication tutorial, as instruction streams.

Written from the tutorial's description: lhsT [K, M] and rhs [K, N] in HBM, tiles of K 128, M 128,
N 512, sums over K in PSUM, results copied to SBUF and stored. Timing only: no data.

tiled: both tiles loaded for every multiplication. hoist: a row of lhsT tiles and a column of rhs
tiles loaded once each per output tile row and output tile. block: 2 x 2 output tiles share loads.
full: blocks of 16 x 2 x 8 tiles, sums over K blocks in SBUF, loads and stores a block wide.
group 1x2, group 4x2: tiled, with 1 or 4 rows and 2 columns of output tiles at once, each tile of
either operand loaded by a line of its own.
Source: AWS Neuron SDK docs, nki/guides/tutorials/matrix_multiplication.rst; the groups from
ucb-bar/autocomp, examples/trn-tutorial.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

K_TILE, M_TILE, N_TILE = 128, 128, 512
VERSIONS = ("tiled", "hoist", "block", "full", "group 1x2", "group 4x2")


def matmul(version: str, m: int, k: int, n: int, dtype: str = "bfloat16") -> Log:
    """The log of one version for [m, k] x [k, n]; ValueError for an unknown version."""
    builders: dict[str, Callable[[Stream, Tile, Tile, Tile], None]] = {
        "tiled": _tiled,
        "hoist": _hoist,
        "block": _block,
        "full": _full,
        "group 1x2": partial(_group, m_tiles=1),
        "group 4x2": partial(_group, m_tiles=4),
    }
    if version not in builders:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
    s = Stream()
    builders[version](
        s, s.hbm(k, m, dtype=dtype), s.hbm(k, n, dtype=dtype), s.hbm(m, n, dtype=dtype)
    )
    return s.log


def _cut(tensor: Tile, row: int, rows: int, column: int, columns: int) -> Tile:
    return tensor[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]


def _store(s: Stream, out: Tile, acc: Tile, m: int, n: int) -> None:
    result = s.sbuf(M_TILE, N_TILE, dtype=out.dtype)
    s.vector("tensor_copy", result, acc)
    s.dma(_cut(out, m, M_TILE, n, N_TILE), result)


def _tiled(s: Stream, lhs: Tile, rhs: Tile, out: Tile) -> None:
    for m in range(out.shape[0] // M_TILE):
        for n in range(out.shape[1] // N_TILE):
            acc = s.psum(M_TILE, N_TILE)
            for k in range(lhs.shape[0] // K_TILE):
                a = s.load(_cut(lhs, k, K_TILE, m, M_TILE))
                b = s.load(_cut(rhs, k, K_TILE, n, N_TILE))
                s.matmul(acc, a, b, add=k > 0)
            _store(s, out, acc, m, n)


def _group(s: Stream, lhs: Tile, rhs: Tile, out: Tile, m_tiles: int, n_tiles: int = 2) -> None:
    for m in range(0, out.shape[0] // M_TILE, m_tiles):
        for n in range(0, out.shape[1] // N_TILE, n_tiles):
            sums = [[s.psum(M_TILE, N_TILE) for _ in range(n_tiles)] for _ in range(m_tiles)]
            for k in range(lhs.shape[0] // K_TILE):
                b = [
                    s.load(_cut(rhs, k, K_TILE, n + j, N_TILE), queue=f"rhs {j}")
                    for j in range(n_tiles)
                ]
                for i in range(m_tiles):
                    a = s.load(_cut(lhs, k, K_TILE, m + i, M_TILE), queue=f"lhs {i}")
                    for j in range(n_tiles):
                        s.matmul(sums[i][j], a, b[j], add=k > 0)
            for i in range(m_tiles):
                for j in range(n_tiles):
                    _store(s, out, sums[i][j], m + i, n + j)


def _hoist(s: Stream, lhs: Tile, rhs: Tile, out: Tile) -> None:
    depth = range(lhs.shape[0] // K_TILE)
    for m in range(out.shape[0] // M_TILE):
        a = [s.load(_cut(lhs, k, K_TILE, m, M_TILE)) for k in depth]
        for n in range(out.shape[1] // N_TILE):
            b = [s.load(_cut(rhs, k, K_TILE, n, N_TILE)) for k in depth]
            acc = s.psum(M_TILE, N_TILE)
            for k in depth:
                s.matmul(acc, a[k], b[k], add=k > 0)
            _store(s, out, acc, m, n)


def _block(s: Stream, lhs: Tile, rhs: Tile, out: Tile, m_tiles: int = 2, n_tiles: int = 2) -> None:
    depth = range(lhs.shape[0] // K_TILE)
    for m in range(0, out.shape[0] // M_TILE, m_tiles):
        rows = range(m, m + m_tiles)
        a = [[s.load(_cut(lhs, k, K_TILE, i, M_TILE)) for k in depth] for i in rows]
        for n in range(0, out.shape[1] // N_TILE, n_tiles):
            columns = range(n, n + n_tiles)
            b = [[s.load(_cut(rhs, k, K_TILE, j, N_TILE)) for k in depth] for j in columns]
            for i in range(m_tiles):
                for j in range(n_tiles):
                    acc = s.psum(M_TILE, N_TILE)
                    for k in depth:
                        s.matmul(acc, a[i][k], b[j][k], add=k > 0)
                    _store(s, out, acc, m + i, n + j)


def _full(
    s: Stream,
    lhs: Tile,
    rhs: Tile,
    out: Tile,
    m_tiles: int = 16,
    n_tiles: int = 2,
    k_tiles: int = 8,
) -> None:
    dtype = lhs.dtype
    width, height = n_tiles * N_TILE, m_tiles * M_TILE
    for n in range(out.shape[1] // width):
        sums = [s.sbuf(M_TILE, width, dtype=dtype) for _ in range(out.shape[0] // M_TILE)]
        for tile in sums:
            s.vector("memset", tile)
        for block in range(lhs.shape[0] // (K_TILE * k_tiles)):
            b = s.sbuf(K_TILE, k_tiles, width, dtype=dtype)
            for k in range(k_tiles):
                s.dma(b[:, k], _cut(rhs, block * k_tiles + k, K_TILE, n, width))
            for m in range(out.shape[0] // height):
                a = s.sbuf(K_TILE, k_tiles, height, dtype=dtype)
                for k in range(k_tiles):
                    s.dma(a[:, k], _cut(lhs, block * k_tiles + k, K_TILE, m, height))
                _multiply_block(s, a, b, sums[m * m_tiles : (m + 1) * m_tiles], n_tiles, k_tiles)
        for m, tile in enumerate(sums):
            s.dma(_cut(out, m, M_TILE, n, width), tile)


def _multiply_block(
    s: Stream, a: Tile, b: Tile, sums: list[Tile], n_tiles: int, k_tiles: int
) -> None:
    for j in range(n_tiles):
        columns = slice(j * N_TILE, (j + 1) * N_TILE)
        for i, tile in enumerate(sums):
            acc = s.psum(M_TILE, N_TILE)
            for k in range(k_tiles):
                s.matmul(acc, a[:, k, i * M_TILE : (i + 1) * M_TILE], b[:, k, columns], add=k > 0)
            s.vector("tensor_tensor", tile[:, columns], tile[:, columns], acc)
