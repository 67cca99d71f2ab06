"""Flash attention forward over one rectangle of scores: q, k, v and a carry -> o, lse, statistics.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim of q and k,
E head dim of v; in a tile M <= 128 query rows, J <= 128 keys, N <= 512 query rows of up to four
units (a unit: one row tile of one head; query heads of a group share a block); C <= 128 of D.

The mathematics, per query row, with a shift c that is known before the sum begins:

    x_j = q k_j  (or tanh(scale * q k_j / softcap)),  f = scale (or softcap)
    c   = max over the visible keys of x_j                         shift "row_max"; 0 for "none"
    p_j = exp(f * (x_j - c)),  l = sum_j p_j,  acc = sum_j p_j v_j
    w   = max(f * c, w_in),   L = exp(f * c - w) l + exp(w_in - w) L_in
    o   = (exp(f * c - w) acc + exp(w_in - w) L_in o_in) / L,   lse = w + log L

o_in and the statistics (w_in, L_in) are the carry, the merged result of earlier hops: one more key,
whose score is w_in + log L_in and whose value is o_in. As carries a finished (o, lse) is o with the
statistics (lse, 1), and a learnable sink 0 with (sink, 1). Statistics pass from hop to hop and not
lse: each time that a logarithm is rounded, the weight of all that came before would move.

Scores are transposed, [keys, queries], because exp's output is then at once the stationary operand
of p v, and l comes out of the same matmul through a column of ones beside v: no transpose, no
rescaling and no row maximum between the two matmuls. The shift cannot be a bias there (it lies on
the free axis), so one more matmul subtracts it in PSUM: c as three bf16 pieces, which carry all
24 bits of an fp32, times rows of ones. How c is found: shift.py; one tile of p: probabilities.py;
the merge with the carry: finish.py.

Precision: matmul operands and p are in the input dtype (bf16, fp16 or fp32); scores, c, l, acc, w,
L, o and lse are fp32. l is the sum of the rounded p, the same that weigh v. A row that has seen
nothing leaves with o = 0, lse = w = EMPTY_LSE and L = 1, and may come so as carry.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .finish import finish, store_statistics
from .masks import check_mask, load_bounds, make_indices, reachable
from .probabilities import probabilities
from .shift import find_shift
from .tiles import (
    ROWS,
    lengths_of,
    load_rows,
    load_units,
    make_identity,
    my_items,
    query_units,
    rows_of,
    spans,
    transpose_tiles,
    whole,
)

UNITS = 4  # row tiles of one block: 512 columns of scores, and four accumulators in PSUM


@nki.jit
def flash_fwd(
    q_BHSD, k_BGKD, v_BGKE, mask, scale, softcap=0.0, shift="row_max", carry=(), bounds=()
):
    """Attention of every query row over one block of keys, merged into what came before.

    Args:
        q_BHSD: HBM [B, H, S, D], bf16, fp16 or fp32; any S, D at most 256.
        k_BGKD, v_BGKE: HBM [B, G, K, D] and [B, G, K, E], q's dtype; any K, E at most 256,
            G divides H.
        mask: "full", "causal", "strict" (the last two need S == K) or "interval".
        scale: factor on the scores; softcap: 0.0 for none, or the cap. Compile-time floats.
        shift: "row_max", or "none" where the caller knows that |scaled score| <= 27.
        carry: () or (o [B, H, S, E], statistics [B, H, S, 2]) of earlier blocks, HBM fp32.
        bounds: () or, for mask "interval", four HBM fp32 tensors: first and stop key of every
            query [B, S, 1] twice, first and stop query of every key [B, K, 1] twice.

    Returns:
        o [B, H, S, E] fp32, normalised; lse [B, H, S, 1] fp32, the natural logarithm with the
        scale included; and the statistics [B, H, S, 2] fp32, w and L, for the next block's carry.
        All are over the carry and this block.
    """
    num_batches, num_heads, num_rows = q_BHSD.shape[0], q_BHSD.shape[1], q_BHSD.shape[2]
    num_groups, value_dim = k_BGKD.shape[1], v_BGKE.shape[3]
    check_mask(mask, num_rows, k_BGKD.shape[2], bounds)
    o_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, value_dim), dtype=nl.float32, buffer=nl.shared_hbm
    )
    lse_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, 1), dtype=nl.float32, buffer=nl.shared_hbm
    )
    statistics_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, 2), dtype=nl.float32, buffer=nl.shared_hbm
    )
    options = {"mask": mask, "scale": scale, "softcap": softcap, "shift": shift}
    eyes = (make_identity(q_BHSD.dtype), make_identity(nl.bfloat16))
    places = {"q": whole(q_BHSD), "k": whole(k_BGKD), "v": whole(v_BGKE), "carry": ()}
    places["o"], places["lse"] = whole(o_hbm), whole(lse_hbm)
    places["statistics"] = whole(statistics_hbm)
    if len(carry) > 0:
        places["carry"] = (whole(carry[0]), whole(carry[1]))
    items = my_items(num_batches, num_groups)
    for i in range(len(items)):
        b, g = items[i]
        units = query_units(num_heads, num_groups, g, num_rows)
        rectangle(places, b, g, units, load_limits(bounds, b), options, eyes)
    return o_hbm, lse_hbm, statistics_hbm


def rectangle(places, b, g, units, limits, options, eyes):
    """The query heads of one group over one rectangle of scores, from HBM to HBM.

    places: where "q", "k", "v", "o", "lse", "statistics" and "carry" (nothing, or o and statistics)
    are; see tiles.py.
    """
    keys = load_keys(places, b, g, eyes[0])
    statistics_MT2 = nl.ndarray((ROWS, len(units), 2), dtype=nl.float32, buffer=nl.sbuf)
    blocks = spans(len(units), UNITS)
    for j in range(len(blocks)):
        first, count = blocks[j]
        queries = load_queries(places["q"], b, units[first : first + count], eyes[0])
        results = (places, statistics_MT2, first)
        attend_block(queries, keys, limits, b, results, options, eyes[1])
    store_statistics(places, b, units, statistics_MT2)


def attend_block(queries, keys, limits, b, results, options, identity_PP):
    """One block of queries from its shift to its output. Its tiles in PSUM live here only."""
    c_MU, shift = find_shift(queries, keys, limits, options, identity_PP)
    acc = attend(queries, keys, limits, shift, options)
    finish(acc, c_MU, b, queries["units"], results, options)


def load_keys(places, b, g, identity_PP):
    """One head's keys as [C, K] pieces, and its values with a column of ones, [128, tiles, E + 1].

    The last tile of keys may be short; its missing partitions are never read.
    """
    k_place, v_place = places["k"], places["v"]
    tiles = spans(k_place["rows"], ROWS)
    kT_CK = transpose_tiles(load_rows(k_place, b, g), lengths_of(tiles), identity_PP)
    value_dim, dtype = v_place["width"], v_place["hbm"].dtype
    v1_JTE = nl.ndarray((ROWS, len(tiles), value_dim + 1), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=v1_JTE[:, :, value_dim : value_dim + 1], value=1.0)
    for t in range(len(tiles)):
        start, rows = tiles[t]
        src = rows_of(v_place, b, g, start, rows)
        nisa.dma_copy(dst=v1_JTE[0:rows, t, 0:value_dim], src=src)  # DMA
    return {"kT": kT_CK, "v1": v1_JTE, "tiles": tiles, "count": k_place["rows"]}


def load_limits(bounds, b):
    """The bounds of one batch element: (first, stop) per query, per key, and gen2's indices."""
    if len(bounds) == 0:
        return ()
    return (
        load_bounds(bounds[0], bounds[1], b),
        load_bounds(bounds[2], bounds[3], b),
        make_indices(),
    )


def load_queries(place, b, block, identity_PP):
    """The queries of a block as [C, N] pieces, with the columns at which each unit lies."""
    q_MUD = load_units(place, b, block)
    lengths = lengths_of(block)
    columns = []
    total = 0
    for u in range(len(lengths)):
        columns.append((total, total + lengths[u]))
        total += lengths[u]
    qT_CN = transpose_tiles(q_MUD, lengths, identity_PP)
    return {"qT": qT_CN, "units": block, "columns": columns, "dtype": q_MUD.dtype}


def attend(queries, keys, limits, shift, options):
    """One accumulator [M, E + 1] in PSUM per unit: p v and, in the last column, the sum of p.

    Key tiles run backwards, so that GpSimdE's work on the diagonal hides behind the others.
    """
    units, tiles, mask = queries["units"], keys["tiles"], options["mask"]
    value_columns = keys["v1"].shape[2]
    acc = []
    for u in range(len(units)):
        acc.append(nl.ndarray((units[u][2], value_columns), dtype=nl.float32, buffer=nl.psum))
    for t in range(len(tiles) - 1, -1, -1):
        key_start, num_keys = tiles[t]
        seeing = units_that_reach(units, mask, key_start)
        if len(seeing) > 0:
            pT_JN = probabilities(queries, keys, limits, shift, options, t, seeing[0])
            v1_JE = keys["v1"][0:num_keys, t, :]
            origin = queries["columns"][seeing[0]][0]
            for i in range(len(seeing)):
                u = seeing[i]
                first, stop = queries["columns"][u]
                pT_JM = pT_JN[:, first - origin : stop - origin]
                nisa.nc_matmul(dst=acc[u], stationary=pT_JM, moving=v1_JE)  # TensorE  JM,JE->ME
    return acc


def units_that_reach(units, mask, key_start):
    """Indices of the units that can see a key tile: the last ones, as rows ascend."""
    seeing = []
    for u in range(len(units)):
        _, start, rows = units[u]
        if reachable(mask, start + rows, key_start, 1) > 0:
            seeing.append(u)
    return seeing
