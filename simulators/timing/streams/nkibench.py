"""Six kernels of NKIBench, as instruction streams: fp32, written from their published sources.

Where a source leaves the choice of engine to the compiler, the published shares of busy time
decide: scalings, reciprocals and square roots on ScalarE, products and sums of two tensors on
VectorE. Where published HBM traffic shows that the compiler kept or reloaded an operand, the stream
does too. A product whose left side is not transposed transposes it where it stands in the source,
and loops of 128 columns are one instruction per 512: affine_loops in docs/timing.md.

Letters: M rows, K contraction, N columns.
Source: zhang677/AccelOpt, NKIBench/kernels and experiments/full_complete_local/profile_results.csv.
"""

from __future__ import annotations

from nxd_cp.simulators.nki_api.log import Log

from .builder import Stream, Tile

ROWS, BANK = 128, 512
FP32 = "float32"


def nkibench(name: str) -> Log:
    """The log of a kernel by its published name; ValueError for an unknown one."""
    kernels = {
        "silu_M4096_N7168": _silu,
        "adamw_M10944_N2048": _adamw,
        "matmul_K5120_M4096_N12288": _matmul,
        "rmsnorm_matmul_K1024_M4096_N2048": _rmsnorm_matmul,
        "add_rmsnorm_matmul_K1024_M4096_N2048": _add_rmsnorm_matmul,
        "matmul_add_rmsnorm_K2048_M4096_N2048": _matmul_add_rmsnorm,
    }
    if name not in kernels:
        raise ValueError(f"name: expected one of {', '.join(kernels)}, got {name!r}")
    s = Stream()
    kernels[name](s)
    return s.log


def _tile(s: Stream, columns: int = BANK) -> Tile:
    return s.sbuf(ROWS, columns, dtype=FP32)


def _halves(tile: Tile) -> list[Tile]:
    return [tile[:, start : start + BANK] for start in range(0, tile.shape[1], BANK)]


def _silu(s: Stream) -> None:
    """exp, add, reciprocal, multiply on 128 x 512, loads and stores of 128 x 1024."""
    x, y = s.hbm(4096, 7168, dtype=FP32), s.hbm(4096, 7168, dtype=FP32)
    for row in range(0, 4096, ROWS):
        for column in range(0, 7168, 1024):
            part = (slice(row, row + ROWS), slice(column, column + 1024))
            data, out = s.load(x[part]), _tile(s, 1024)
            for given, result in zip(_halves(data), _halves(out), strict=True):
                a, b, c = _tile(s), _tile(s), _tile(s)
                s.scalar("exp", a, given)
                s.scalar("copy", b, a)
                s.scalar("reciprocal", c, b)
                s.vector("tensor_tensor", result, given, c)
            s.dma(y[part], out)


def _adamw(s: Stream) -> None:
    """Nine scalings, roots and reciprocals and six products or sums per 128 x 512."""
    theta, m, v, g, out = (s.hbm(10944, 2048, dtype=FP32) for _ in range(5))
    for row in range(0, 10944, ROWS):
        rows = slice(row, min(row + ROWS, 10944))
        for column in range(0, 2048, 1024):
            part = (rows, slice(column, column + 1024))
            loaded = [s.load(theta[part]), s.load(m[part]), s.load(v[part]), s.load(g[part])]
            result = _tile(s, 1024)
            for *given, target in zip(*map(_halves, (*loaded, result)), strict=True):
                _adamw_half(s, given, target)
            s.dma(out[part], result[: rows.stop - rows.start])


def _adamw_half(s: Stream, given: list[Tile], out: Tile) -> None:
    theta, m, v, g = given

    def scaled(tile: Tile, function: str = "copy") -> Tile:
        target = _tile(s)
        s.scalar(function, target, tile)
        return target

    def joined(a: Tile, b: Tile) -> Tile:
        target = _tile(s)
        s.vector("tensor_tensor", target, a, b)
        return target

    kept = joined(theta, scaled(theta))
    momentum = scaled(joined(scaled(m), scaled(g)))
    second = joined(scaled(v), joined(scaled(g), g))
    inverse = scaled(scaled(scaled(second, "sqrt")), "reciprocal")
    s.vector("tensor_tensor", out, kept, joined(momentum, inverse))


def _transposed_blocks(s: Stream, rows: Tile) -> list[Tile]:
    """[128, K] to K / 128 blocks [128, 128], four to a PSUM bank, copied by ScalarE."""
    blocks = []
    for start in range(0, rows.shape[1], BANK):
        bank, four = s.psum(ROWS, BANK), _tile(s)
        for j in range(0, BANK, ROWS):
            s.transpose(bank[:, j : j + ROWS], rows[:, start + j : start + j + ROWS])
        s.scalar("copy", four, bank)
        blocks += [four[:, j : j + ROWS] for j in range(0, BANK, ROWS)]
    return blocks


def _matmul(s: Stream) -> None:
    """M 4096, K 5120, N 12288; the right side is reloaded for every 128 rows (its HBM traffic)."""
    depth, width = 5120, 1024
    lhs, rhs = s.hbm(4096, depth, dtype=FP32), s.hbm(depth, 12288, dtype=FP32)
    out = s.hbm(4096, 12288, dtype=FP32)
    for column in range(0, 12288, width):
        columns = slice(column, column + width)
        for row in range(0, 4096, ROWS):
            rows = slice(row, row + ROWS)
            blocks: list[Tile] = []
            for start in range(0, depth, 1024):
                part = s.load(lhs[rows, start : start + 1024])
                blocks += _transposed_blocks(s, part)
            sums = [s.psum(ROWS, BANK) for _ in range(2)]
            for k, block in enumerate(blocks):
                right = s.load(rhs[k * ROWS : (k + 1) * ROWS, columns])
                for acc, half in zip(sums, _halves(right), strict=True):
                    s.matmul(acc, block, half, add=k > 0)
            result = _tile(s, width)
            for acc, half in zip(sums, _halves(result), strict=True):
                s.scalar("copy", half, acc)
            s.dma(out[rows, columns], result)


def _weights(s: Stream, depth: int, columns: int) -> list[Tile]:
    w = s.hbm(depth, columns, dtype=FP32)
    return [s.load(w[k : k + ROWS]) for k in range(0, depth, ROWS)]


def _norm(s: Stream, data: Tile) -> Tile:
    """1 / rms of every row, [128, 1]."""
    width = data.shape[1]
    square, total, inverse = _tile(s, width), _tile(s, 1), _tile(s, 1)
    s.scalar("square", square, data)
    s.vector("tensor_reduce", total, square)
    s.scalar("rsqrt", inverse, total)
    return inverse


def _product(s: Stream, rows: Tile, weights: list[Tile], out: Tile) -> None:
    """out [128, N] = rows weights, one bank at a time, copied by ScalarE; rows as they are."""
    for start in range(0, out.shape[1], BANK):
        acc, blocks = s.psum(ROWS, BANK), _transposed_blocks(s, rows)
        for k, block in enumerate(blocks):
            s.matmul(acc, block, weights[k][:, start : start + BANK], add=k > 0)
        s.scalar("copy", out[:, start : start + BANK], acc)


def _rmsnorm_matmul(s: Stream) -> None:
    """M 4096, K 1024, N 2048, weights read once per four row blocks of 1024; transposed once."""
    x, out = s.hbm(4096, 1024, dtype=FP32), s.hbm(4096, 2048, dtype=FP32)
    weights = _weights(s, 1024, 2048)
    for row in range(0, 4096, ROWS):
        data = s.load(x[row : row + ROWS])
        inverse = _norm(s, data)
        again, scaled = s.load(x[row : row + ROWS]), _tile(s, 1024)
        s.scalar("copy", scaled, again, inverse)
        blocks, result = _transposed_blocks(s, scaled), _tile(s, 2048)
        for start in range(0, 2048, BANK):
            acc = s.psum(ROWS, BANK)
            for k, block in enumerate(blocks):
                s.matmul(acc, block, weights[k][:, start : start + BANK], add=k > 0)
            s.scalar("copy", result[:, start : start + BANK], acc)
        s.dma(out[row : row + ROWS], result)


def _gained(s: Stream, data: Tile, gain: Tile, ones: Tile) -> Tile:
    """data times gain [1, N], which a multiplication with ones spreads over the rows."""
    result = _tile(s, data.shape[1])
    for start in range(0, data.shape[1], BANK):
        part, spread = slice(start, start + BANK), s.psum(ROWS, BANK)
        s.matmul(spread, ones, gain[:, part])
        s.vector("tensor_tensor", result[:, part], data[:, part], spread)
    return result


def _ones_and_gain(s: Stream, columns: int) -> tuple[Tile, Tile]:
    ones = s.sbuf(1, ROWS, dtype=FP32)
    s.vector("memset", ones)
    return ones, s.load(s.hbm(1, columns, dtype=FP32))


def _add_rmsnorm_matmul(s: Stream) -> None:
    """x + z, norm, gain, product; M 4096, K 1024, N 2048; weights stay in SBUF."""
    x, z = s.hbm(4096, 1024, dtype=FP32), s.hbm(4096, 1024, dtype=FP32)
    out = s.hbm(4096, 2048, dtype=FP32)
    weights, (ones, gain) = _weights(s, 1024, 2048), _ones_and_gain(s, 1024)
    for row in range(0, 4096, ROWS):
        rows = slice(row, row + ROWS)
        total, scaled, result = _tile(s, 1024), _tile(s, 1024), _tile(s, 2048)
        s.vector("tensor_tensor", total, s.load(x[rows]), s.load(z[rows]))
        s.scalar("copy", scaled, total, _norm(s, total))
        _product(s, _gained(s, scaled, gain, ones), weights, result)
        for start in range(0, 2048, BANK):
            s.dma(out[rows, start : start + BANK], result[:, start : start + BANK])


def _matmul_add_rmsnorm(s: Stream) -> None:
    """Product, + z, norm, gain; M 4096, K 2048, N 2048; weights stay in SBUF."""
    x, z = s.hbm(4096, 2048, dtype=FP32), s.hbm(4096, 2048, dtype=FP32)
    out = s.hbm(4096, 2048, dtype=FP32)
    weights, (ones, gain) = _weights(s, 2048, 2048), _ones_and_gain(s, 2048)
    for row in range(0, 4096, ROWS):
        rows = slice(row, row + ROWS)
        product, total, scaled = _tile(s, 2048), _tile(s, 2048), _tile(s, 2048)
        _product(s, s.load(x[rows]), weights, product)
        s.vector("tensor_tensor", total, product, s.load(z[rows]))
        s.scalar("copy", scaled, total, _norm(s, total))
        s.dma(out[rows], _gained(s, scaled, gain, ones))
