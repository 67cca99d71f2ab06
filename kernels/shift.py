"""The shift c of every query row, found before its sum begins, and its subtraction in PSUM.

Does: find c = max of the visible x_j in a pass of its own over q k^T, [queries, keys], and write -c
as three rows of bf16, which a matmul adds to transposed scores. Does not: sum anything.

"row_max" is exact, so that p <= 1 for every finite score: no bound on norms could promise that exp
neither overflows nor loses a row whole. "none" is for callers who know that |f * x| <= 27.

Letters as in flash_fwd.py: M query rows on partitions, N columns, U units of a block, J keys.
"""

import nki.isa as nisa
import nki.language as nl

from .masks import (
    MASKED_SCORE,
    cut_future_keys,
    inside,
    keep_inside,
    on_diagonal,
    reachable,
)
from .tiles import ROWS, WIDTH, contract, is_gen2, spans, transpose


def find_shift(queries, keys, limits, options, identity_PP):
    """c of every row, fp32 [128, units], and -c as three bf16 rows [3, N] (none: 0 and nothing)."""
    c_MU = fresh_maxima(queries)
    if options["shift"] == "row_max":
        raise_maxima(c_MU, queries, keys, limits, options["mask"])
    return make_shift(c_MU, queries, options, identity_PP)


def fresh_maxima(queries):
    """A maximum per row, [128, units], that nothing has raised yet."""
    c_MU = nl.ndarray((ROWS, len(queries["units"])), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=c_MU, value=MASKED_SCORE)
    return c_MU


def raise_maxima(c_MU, queries, keys, limits, mask):
    """c = max(c, q k^T over the keys that each row sees)."""
    for u in range(len(queries["units"])):
        row_maximum(c_MU, u, queries, keys, limits, mask)


def make_shift(c_MU, queries, options, identity_PP):
    """What `find_shift` returns, of maxima of q k^T; with shift "none" they are not read."""
    if options["shift"] == "none":
        nisa.memset(dst=c_MU, value=0.0)
        return c_MU, ()
    softcap = options["softcap"]
    if softcap != 0.0:
        nisa.activation(dst=c_MU, op=nl.tanh, data=c_MU, scale=options["scale"] / softcap)
    return c_MU, split_shift(c_MU, queries, identity_PP)


def row_maximum(c_MU, u, queries, keys, limits, mask):
    """c = max(c, q k^T over the keys that each row of unit u sees)."""
    _, start, rows = queries["units"][u]
    tiles = []
    wide_tiles = spans(keys["count"], WIDTH)
    for t in range(len(wide_tiles)):
        key_start, length = wide_tiles[t]
        num_keys = reachable(mask, start + rows, key_start, length)
        if num_keys > 0:
            tiles.append((key_start, num_keys))
    max_MT = nl.ndarray((rows, len(tiles) + 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=max_MT[:, len(tiles) : len(tiles) + 1], src=c_MU[0:rows, u : u + 1])
    for t in range(len(tiles)):
        key_start, num_keys = tiles[t]
        s_psum_MN = nl.ndarray((rows, num_keys), dtype=nl.float32, buffer=nl.psum)
        key_span = (key_start, key_start + num_keys)
        contract(s_psum_MN, queries["qT"], queries["columns"][u], keys["kT"], key_span)
        visible_maximum(max_MT[:, t : t + 1], s_psum_MN, start, key_start, limits, mask)
    nisa.tensor_reduce(dst=c_MU[0:rows, u : u + 1], op=nl.maximum, data=max_MT, axis=1)  # VectorE


def visible_maximum(max_M1, s_psum_MN, row_start, key_start, limits, mask):
    """The maximum of a score tile [queries, keys] over what each row sees of it. VectorE."""
    rows, num_keys = s_psum_MN.shape
    if mask == "interval":
        first_MT, stop_MT = limits[0]
        t = row_start // ROWS
        first_M1, stop_M1 = first_MT[0:rows, t : t + 1], stop_MT[0:rows, t : t + 1]
        s_MN = nl.ndarray((rows, num_keys), dtype=nl.float32, buffer=nl.sbuf)
        if is_gen2():
            seen_MN = nl.ndarray((rows, num_keys), dtype=nl.uint8, buffer=nl.sbuf)
            indices_MN = limits[2][0:rows, 0:num_keys]
            inside(seen_MN, indices_MN, first_M1, stop_M1, key_start)
            nisa.memset(dst=s_MN, value=MASKED_SCORE)
            nisa.tensor_copy_predicated(dst=s_MN, src=s_psum_MN, predicate=seen_MN)
        else:
            keep_inside(s_MN, s_psum_MN, first_M1, stop_M1, key_start)
        nisa.tensor_reduce(dst=max_M1, op=nl.maximum, data=s_MN, axis=1)
    elif on_diagonal(mask, row_start, key_start, num_keys):
        s_MN = nl.ndarray((rows, num_keys), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=s_MN, src=s_psum_MN)  # GpSimdE, which masks, cannot read PSUM
        square = max(0, row_start - key_start)
        triangle_MN = s_MN[:, square:num_keys]
        cut_future_keys(triangle_MN, mask, row_start - key_start - square, MASKED_SCORE)
        nisa.tensor_reduce(dst=max_M1, op=nl.maximum, data=s_MN, axis=1)
    else:
        nisa.tensor_reduce(dst=max_M1, op=nl.maximum, data=s_psum_MN, axis=1)


def split_shift(c_MU, queries, identity_PP):
    """-c as three rows [3, N] in bf16 whose sum is exact: 3 x 8 bits of mantissa."""
    units, columns = queries["units"], queries["columns"]
    rest_MU = nl.ndarray(c_MU.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=rest_MU, data=c_MU, op0=nl.multiply, operand0=-1.0)  # VectorE
    pieces_MU3 = nl.ndarray((ROWS, len(units), 3), dtype=nl.bfloat16, buffer=nl.sbuf)
    for i in range(3):
        piece_MU = pieces_MU3[:, :, i]
        nisa.tensor_copy(dst=piece_MU, src=rest_MU)  # VectorE, rounds
        nisa.tensor_tensor(dst=rest_MU, data1=rest_MU, data2=piece_MU, op=nl.subtract)  # VectorE
    shift_3N = nl.ndarray((3, columns[len(units) - 1][1]), dtype=nl.bfloat16, buffer=nl.sbuf)
    for u in range(len(units)):
        _, _, rows = units[u]
        first, stop = columns[u]
        transpose(shift_3N[:, first:stop], pieces_MU3[0:rows, u, :], identity_PP)
    ones_3J = nl.ndarray((3, ROWS), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones_3J, value=1.0)
    return shift_3N, ones_3J


def subtract_shift(dst_psum_JN, shift, column_span):
    """dst -= c, one number per column, as a matmul of ones with the pieces of -c."""
    shift_3N, ones_3J = shift
    num_keys = dst_psum_JN.shape[0]
    ones_piece = ones_3J[:, 0:num_keys]
    shift_piece = shift_3N[:, column_span[0] : column_span[1]]
    nisa.nc_matmul(  # TensorE  3J,3N->JN
        dst=dst_psum_JN, stationary=ones_piece, moving=shift_piece
    )
