"""Flash attention forward under an interval mask, skipping at run time what nobody sees.

The mathematics and the phases are those of flash_fwd.py; what differs is that keys come by device
loops, which turn from the first to the last chunk of 512 keys that a block of queries sees, as its
intervals say when the kernel runs:

    for each block of up to four row tiles                                      (unrolled)
        first, stop = the chunks that its rows see                              registers
        for chunk in first .. stop:  c = max(c, q k^T)                          device loop
        for chunk in first .. stop:  acc += p v                                 device loop
        merge with the carry, write o

So a window costs what it sees, and the program's length depends on the number of queries alone: one
program for any packing and for any number of keys. The price: keys are loaded and transposed for
every block and in both loops, sums move from PSUM to SBUF after every chunk, and no chunk's work
overlaps another's unless the hardware loop does it.

What moves: the addresses of DMA. Query indices are the same in every turn; a query's bounds, which
are compared with key indices, are lowered by 512 after each turn instead.

NKI 0.6 and later. Letters and precision: flash_fwd.py.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .finish import finish, store_statistics
from .flash_fwd import UNITS, attend, load_keys, load_queries
from .loops import (
    batches_of_step,
    bounds_of_chunk,
    in_chunks,
    on_all_partitions,
    visible_chunks,
)
from .masks import load_bounds, make_indices
from .shift import fresh_maxima, make_shift, raise_maxima
from .tiles import (
    ROWS,
    lengths_of,
    load_rows,
    make_identity,
    moving_chunk,
    my_items,
    query_units,
    spans,
    transpose_tiles,
    whole,
)

NKI_SINCE = "0.6"  # nl.fori_loop
LOG_CHUNK = 9
CHUNK = 512  # keys per turn


@nki.jit
def loop_fwd(
    q_BHSD, k_BGKD, v_BGKE, mask, scale, softcap=0.0, shift="row_max", carry=(), bounds=()
):
    """Attention of every query row over one block of keys, merged into what came before.

    Args:
        q_BHSD, scale, softcap, shift, carry, bounds: as `flash_fwd` takes them.
        k_BGKD, v_BGKE: likewise, K a multiple of 512; keys that no query sees may be anything
            finite.
        mask: "interval".

    Returns:
        o [B, H, S, E], lse [B, H, S, 1] and the statistics [B, H, S, 2], fp32, as `flash_fwd`.
    """
    assert mask == "interval", "static masks are skipped at compile time, by flash_fwd"
    assert k_BGKD.shape[2] % CHUNK == 0, "whole chunks of keys"
    num_batches, num_heads, num_rows = q_BHSD.shape[0], q_BHSD.shape[1], q_BHSD.shape[2]
    num_groups, value_dim = k_BGKD.shape[1], v_BGKE.shape[3]
    o_shape = (num_batches, num_heads, num_rows, value_dim)
    lse_shape = (num_batches, num_heads, num_rows, 1)
    statistics_shape = (num_batches, num_heads, num_rows, 2)
    o_hbm = nl.ndarray(o_shape, dtype=nl.float32, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray(lse_shape, dtype=nl.float32, buffer=nl.shared_hbm)
    statistics_hbm = nl.ndarray(statistics_shape, dtype=nl.float32, buffer=nl.shared_hbm)
    options = {"mask": mask, "scale": scale, "softcap": softcap, "shift": shift}
    eyes = (make_identity(q_BHSD.dtype), make_identity(nl.bfloat16))
    places = {"q": whole(q_BHSD), "o": whole(o_hbm), "lse": whole(lse_hbm), "carry": ()}
    places["statistics"] = whole(statistics_hbm)
    if len(carry) > 0:
        places["carry"] = (whole(carry[0]), whole(carry[1]))
    kv = (in_chunks(k_BGKD, CHUNK), in_chunks(v_BGKE, CHUNK))
    items = my_items(num_batches, num_groups)
    for i in range(len(items)):
        b, g = items[i]
        units = query_units(num_heads, num_groups, g, num_rows)
        batches = batches_of_step(num_batches, num_groups, i)
        rectangle(places, kv, (b, g, batches), units, bounds, options, eyes)
    return o_hbm, lse_hbm, statistics_hbm


def rectangle(places, kv, at, units, bounds, options, eyes):
    """The query heads of one group over one rectangle of scores, from HBM to HBM."""
    b, g, batches = at
    statistics_MT2 = nl.ndarray((ROWS, len(units), 2), dtype=nl.float32, buffer=nl.sbuf)
    row_bounds, indices_PN = load_bounds(bounds[0], bounds[1], b), make_indices()
    blocks = spans(len(units), UNITS)
    for j in range(len(blocks)):
        first, count = blocks[j]
        queries = load_queries(places["q"], b, units[first : first + count], eyes[0])
        turns = rows_that_turn(queries["units"], bounds, batches)
        c_MU = fresh_maxima(queries)
        if options["shift"] == "row_max":
            find_maxima(c_MU, queries, kv[0], (b, g), turns, (row_bounds, indices_PN), eyes[0])
        _, shift = make_shift(c_MU, queries, options, eyes[1])
        limits = (bounds[2:4], indices_PN)
        acc = sum_values(queries, kv, (b, g), turns, limits, shift, options, eyes[0])
        finish(acc, c_MU, b, queries["units"], (places, statistics_MT2, first), options)
    store_statistics(places, b, units, statistics_MT2)


def rows_that_turn(units, bounds, batches):
    """The chunks of keys that the rows of a block see: see `visible_chunks`."""
    _, start, _ = units[0]
    _, last, rows = units[len(units) - 1]
    return visible_chunks(bounds[0], bounds[1], batches, (start, last + rows - start), LOG_CHUNK)


def find_maxima(c_MU, queries, k_hbm, at, turns, limits, identity_PP):
    """c = max of q k^T over what each row sees: the first device loop."""
    b, g = at
    lower, upper, origin_11 = turns
    origin_P1 = on_all_partitions(origin_11)
    first_MT = nl.ndarray(limits[0][0].shape, dtype=nl.float32, buffer=nl.sbuf)
    stop_MT = nl.ndarray(limits[0][1].shape, dtype=nl.float32, buffer=nl.sbuf)
    lowered(first_MT, limits[0][0], origin_P1)
    lowered(stop_MT, limits[0][1], origin_P1)

    def turn(chunk):
        k_place = moving_chunk(k_hbm, chunk, 0, k_hbm.shape[4])
        lengths = lengths_of(spans(CHUNK, ROWS))
        kT_CK = transpose_tiles(load_rows(k_place, b, g), lengths, identity_PP)
        keys = {"kT": kT_CK, "count": CHUNK}
        here = ((first_MT, stop_MT), (), limits[1])
        raise_maxima(c_MU, queries, keys, here, "interval")
        lowered(first_MT, first_MT, float(CHUNK))
        lowered(stop_MT, stop_MT, float(CHUNK))

    nl.fori_loop(lower, upper, turn)


def lowered(dst_MT, bound_MT, by):
    """dst = bound - by. VectorE."""
    nisa.tensor_scalar(dst=dst_MT, data=bound_MT, op0=nl.subtract, operand0=by)


def sum_values(queries, kv, at, turns, limits, shift, options, identity_PP):
    """p v and, in the last column, the sum of p, fp32 [M, E + 1] in SBUF: the second device loop.

    limits: the bounds of keys in HBM, and gen2's indices.
    """
    b, g = at
    k_hbm, v_hbm = kv
    units = queries["units"]
    total = []
    for u in range(len(units)):
        shape = (units[u][2], v_hbm.shape[4] + 1)
        total.append(nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf))
        nisa.memset(dst=total[u], value=0.0)

    def turn(chunk):
        places = {
            "k": moving_chunk(k_hbm, chunk, 0, k_hbm.shape[4]),
            "v": moving_chunk(v_hbm, chunk, 0, v_hbm.shape[4]),
        }
        keys = load_keys(places, b, g, identity_PP)
        here = ((), bounds_of_chunk(limits[0], b, CHUNK, chunk), limits[1])
        acc = attend(queries, keys, here, shift, options)
        for u in range(len(units)):
            nisa.tensor_tensor(dst=total[u], data1=total[u], data2=acc[u], op=nl.add)  # VectorE

    nl.fori_loop(turns[0], turns[1], turn)
    return total
