"""Flash attention forward over one rectangle of scores: q, k, v and a carry -> o, lse.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim of q and k,
E head dim of v; in a tile M <= 128 query rows, J <= 128 keys, N <= 512 query rows of up to four
units (a unit: one row tile of one head; query heads of a group share a block); C <= 128 of D.

The mathematics, per query row, with a shift c that is known before the sum begins:

    x_j = q k_j  (or tanh(scale * q k_j / softcap)),  f = scale (or softcap)
    c   = max over the visible keys of x_j                         shift "row_max"; 0 for "none"
    p_j = exp(f * (x_j - c)),  l = sum_j p_j,  acc = sum_j p_j v_j
    w   = max(f * c, lse_in),  L = exp(f * c - w) l + exp(lse_in - w)
    o   = (exp(f * c - w) acc + exp(lse_in - w) o_in) / L,   lse = w + log L

(o_in, lse_in) is the carry, the merged result of earlier hops: one more key, whose score is lse_in
and whose value is o_in. A learnable sink is the carry (0, sink).

Scores are transposed, [keys, queries], because exp's output is then at once the stationary operand
of p v, and l comes out of the same matmul through a column of ones beside v: no transpose, no
rescaling and no row maximum between the two matmuls. The shift cannot be a bias there (it lies on
the free axis), so one more matmul subtracts it in PSUM: c as three bf16 pieces, which carry all
24 bits of an fp32, times rows of ones. "row_max" finds c in a pass of its own over q k^T in the
other orientation. It is exact, so that p <= 1 for every finite score: no bound on norms could
promise that exp neither overflows nor loses a row whole. "none" is for callers who know that
|f * x| <= 32 (QK-norm); it needs neither the pass nor the matmul.

Precision: matmul operands and p are in the input dtype (bf16, fp16 or fp32); scores, c, l, acc, o
and lse are fp32. l is the sum of the rounded p, the same that weigh v. A row that has seen nothing
leaves with o = 0 and lse = EMPTY_LSE, and may come so as carry.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .masks import (
    MASKED_SCORE,
    cut_future_keys,
    cut_past_queries,
    inside,
    keep_inside,
    load_bounds,
    make_indices,
    on_diagonal,
    reachable,
)
from .tiles import (
    EMPTY_LSE,
    ROWS,
    WIDTH,
    contract,
    is_gen2,
    lengths_of,
    load_row_values,
    load_rows,
    load_units,
    make_identity,
    my_items,
    query_units,
    rows_of,
    spans,
    store_row_values,
    transpose,
    transpose_tiles,
    whole,
)

UNITS = 4  # row tiles of one block: 512 columns of scores, and four accumulators in PSUM
FAR_BELOW = -1.0e31  # f * c of a row that saw nothing: below every lse and EMPTY_LSE


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
        shift: "row_max", or "none" where the caller knows that |scaled score| <= 32.
        carry: () or (o [B, H, S, E], lse [B, H, S, 1]) of earlier blocks, HBM fp32.
        bounds: () or, for mask "interval", four HBM fp32 tensors: first and stop key of every
            query [B, S, 1] twice, first and stop query of every key [B, K, 1] twice.

    Returns:
        o [B, H, S, E] fp32, normalised, and lse [B, H, S, 1] fp32, the natural logarithm with the
        scale included; both over the carry and this block.
    """
    num_batches, num_heads, num_rows = q_BHSD.shape[0], q_BHSD.shape[1], q_BHSD.shape[2]
    num_groups, value_dim = k_BGKD.shape[1], v_BGKE.shape[3]
    o_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, value_dim), dtype=nl.float32, buffer=nl.shared_hbm
    )
    lse_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, 1), dtype=nl.float32, buffer=nl.shared_hbm
    )
    options = {"mask": mask, "scale": scale, "softcap": softcap, "shift": shift}
    eyes = (make_identity(q_BHSD.dtype), make_identity(nl.bfloat16))
    places = {"q": whole(q_BHSD), "k": whole(k_BGKD), "v": whole(v_BGKE), "carry": ()}
    places["o"], places["lse"] = whole(o_hbm), whole(lse_hbm)
    if len(carry) > 0:
        places["carry"] = (whole(carry[0]), whole(carry[1]))
    items = my_items(num_batches, num_groups)
    for i in range(len(items)):
        b, g = items[i]
        units = query_units(num_heads, num_groups, g, num_rows)
        rectangle(places, b, g, units, load_limits(bounds, b), options, eyes)
    return o_hbm, lse_hbm


def rectangle(places, b, g, units, limits, options, eyes):
    """The query heads of one group over one rectangle of scores, from HBM to HBM.

    places: where "q", "k", "v", "o", "lse" and "carry" (nothing, or o and lse) are; see tiles.py.
    """
    keys = load_keys(places, b, g, eyes[0])
    top_MT = nl.ndarray((ROWS, len(units)), dtype=nl.float32, buffer=nl.sbuf)
    sum_MT = nl.ndarray((ROWS, len(units)), dtype=nl.float32, buffer=nl.sbuf)
    blocks = spans(len(units), UNITS)
    for j in range(len(blocks)):
        first, count = blocks[j]
        queries = load_queries(places["q"], b, units[first : first + count], eyes[0])
        results = (places, top_MT, sum_MT, first)
        attend_block(queries, keys, limits, b, results, options, eyes[1])
    store_lse(places["lse"], b, units, top_MT, sum_MT)


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


def find_shift(queries, keys, limits, options, identity_PP):
    """c of every row, fp32 [128, units], and -c as three bf16 rows [3, N] (none: 0 and nothing)."""
    num_units = len(queries["units"])
    c_MU = nl.ndarray((ROWS, num_units), dtype=nl.float32, buffer=nl.sbuf)
    if options["shift"] == "none":
        nisa.memset(dst=c_MU, value=0.0)
        return c_MU, ()
    nisa.memset(dst=c_MU, value=MASKED_SCORE)
    for u in range(num_units):
        row_maximum(c_MU, u, queries, keys, limits, options["mask"])
    nisa.tensor_scalar(dst=c_MU, data=c_MU, op0=nl.maximum, operand0=MASKED_SCORE)  # VectorE
    softcap = options["softcap"]
    if softcap != 0.0:
        nisa.activation(dst=c_MU, op=nl.tanh, data=c_MU, scale=options["scale"] / softcap)
    return c_MU, split_shift(c_MU, queries, identity_PP)


def row_maximum(c_MU, u, queries, keys, limits, mask):
    """c = max of q k^T over the keys that each row of unit u sees."""
    _, start, rows = queries["units"][u]
    tiles = []
    wide_tiles = spans(keys["count"], WIDTH)
    for t in range(len(wide_tiles)):
        key_start, length = wide_tiles[t]
        num_keys = reachable(mask, start + rows, key_start, length)
        if num_keys > 0:
            tiles.append((key_start, num_keys))
    max_MT = nl.ndarray((rows, len(tiles)), dtype=nl.float32, buffer=nl.sbuf)
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


def probabilities(queries, keys, limits, shift, options, t, first_unit):
    """pT [J, N] = exp(f * (x - c)) of one key tile for the columns of first_unit and later.

    In the input dtype, 0 where a query does not see a key. Masked scores may be far above c: they
    are replaced, never multiplied by zero.
    """
    key_start, num_keys = keys["tiles"][t]
    columns = queries["columns"]
    first, stop = columns[first_unit][0], columns[len(columns) - 1][1]
    s_psum_JN = nl.ndarray((num_keys, stop - first), dtype=nl.float32, buffer=nl.psum)
    key_span = (key_start, key_start + num_keys)
    contract(s_psum_JN, keys["kT"], key_span, queries["qT"], (first, stop))
    x_JN, factor = s_psum_JN, options["scale"]
    if options["softcap"] != 0.0:
        x_JN, factor = capped(s_psum_JN, shift, (first, stop), options)
    elif len(shift) > 0:
        subtract_shift(s_psum_JN, shift, (first, stop))
    if options["mask"] == "interval" and not is_gen2():
        x_JN = select_interval(x_JN, queries, limits, t, first_unit)
    pT_JN = nl.ndarray((num_keys, stop - first), dtype=queries["dtype"], buffer=nl.sbuf)
    nisa.activation(dst=pT_JN, op=nl.exp, data=x_JN, scale=factor)  # ScalarE
    if options["mask"] == "interval" and is_gen2():
        return choose_interval(pT_JN, queries, limits, t, first_unit)
    cut_diagonals(pT_JN, queries, options["mask"], key_start, first_unit)
    return pT_JN


def subtract_shift(dst_psum_JN, shift, column_span):
    """dst -= c, one number per column, as a matmul of ones with the pieces of -c."""
    shift_3N, ones_3J = shift
    num_keys = dst_psum_JN.shape[0]
    ones_piece = ones_3J[:, 0:num_keys]
    shift_piece = shift_3N[:, column_span[0] : column_span[1]]
    nisa.nc_matmul(  # TensorE  3J,3N->JN
        dst=dst_psum_JN, stationary=ones_piece, moving=shift_piece
    )


def capped(s_psum_JN, shift, column_span, options):
    """x = tanh(scale * s / softcap), less its shift: fp32 in SBUF; and the factor in the exp."""
    softcap = options["softcap"]
    x_JN = nl.ndarray(s_psum_JN.shape, dtype=nl.float32, buffer=nl.sbuf)
    ratio = options["scale"] / softcap
    nisa.activation(dst=x_JN, op=nl.tanh, data=s_psum_JN, scale=ratio)  # ScalarE
    if len(shift) > 0:
        c_psum_JN = nl.ndarray(s_psum_JN.shape, dtype=nl.float32, buffer=nl.psum)
        subtract_shift(c_psum_JN, shift, column_span)
        nisa.tensor_tensor(dst=x_JN, data1=c_psum_JN, data2=x_JN, op=nl.add)  # VectorE
    return x_JN, softcap


def select_interval(x_JN, queries, limits, t, first_unit):
    """x where the query is one that sees the key, else the least fp32; from gen3. VectorE."""
    num_keys = x_JN.shape[0]
    first_JT, stop_JT = limits[1]
    first_J1, stop_J1 = first_JT[0:num_keys, t : t + 1], stop_JT[0:num_keys, t : t + 1]
    kept_JN = nl.ndarray(x_JN.shape, dtype=nl.float32, buffer=nl.sbuf)
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, _ = units[u]
        first, stop = columns[u][0] - origin, columns[u][1] - origin
        keep_inside(kept_JN[:, first:stop], x_JN[:, first:stop], first_J1, stop_J1, start)
    return kept_JN


def choose_interval(pT_JN, queries, limits, t, first_unit):
    """pT where the query is one that sees the key, else 0; gen2. VectorE."""
    num_keys = pT_JN.shape[0]
    first_JT, stop_JT = limits[1]
    first_J1, stop_J1 = first_JT[0:num_keys, t : t + 1], stop_JT[0:num_keys, t : t + 1]
    seen_JN = nl.ndarray(pT_JN.shape, dtype=nl.uint8, buffer=nl.sbuf)
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, rows = units[u]
        first, stop = columns[u][0] - origin, columns[u][1] - origin
        indices_JM = limits[2][0:num_keys, 0:rows]
        inside(seen_JN[:, first:stop], indices_JM, first_J1, stop_J1, start)
    kept_JN = nl.ndarray(pT_JN.shape, dtype=pT_JN.dtype, buffer=nl.sbuf)
    nisa.memset(dst=kept_JN, value=0.0)
    nisa.tensor_copy_predicated(dst=kept_JN, src=pT_JN, predicate=seen_JN)
    return kept_JN


def cut_diagonals(pT_JN, queries, mask, key_start, first_unit):
    """Zero what lies past the diagonal in the columns of every unit whose diagonal crosses."""
    units, columns = queries["units"], queries["columns"]
    origin = columns[first_unit][0]
    for u in range(first_unit, len(units)):
        _, start, _ = units[u]
        if on_diagonal(mask, start, key_start, pT_JN.shape[0]):
            first, stop = columns[u][0] - origin, columns[u][1] - origin
            cut_past_queries(pT_JN[:, first:stop], mask, start - key_start, 0.0)


def finish(acc, c_MU, b, block, results, options):
    """Merge the accumulators of a block with the carry and write o; keep w and L for the lse."""
    places, top_MT, sum_MT, first_unit = results
    factor = options["scale"]
    if options["softcap"] != 0.0:
        factor = options["softcap"]
    num_units = len(block)
    l_MU = sums(acc, block)
    seen_MU = seen_top(c_MU, l_MU, factor)
    carried_MU = carried_lse(places["carry"], b, block)
    top_MU = top_MT[:, first_unit : first_unit + num_units]
    sum_MU = sum_MT[:, first_unit : first_unit + num_units]
    nisa.tensor_tensor(dst=top_MU, data1=seen_MU, data2=carried_MU, op=nl.maximum)  # VectorE
    new_MU = exp_difference(seen_MU, top_MU)
    old_MU = exp_difference(carried_MU, top_MU)
    nisa.tensor_tensor(dst=sum_MU, data1=new_MU, data2=l_MU, op=nl.multiply)  # VectorE
    nisa.tensor_tensor(dst=sum_MU, data1=sum_MU, data2=old_MU, op=nl.add)  # VectorE
    inverse_MU = nl.ndarray((ROWS, num_units), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse_MU, data=sum_MU)  # VectorE
    nisa.tensor_tensor(dst=new_MU, data1=new_MU, data2=inverse_MU, op=nl.multiply)  # VectorE
    nisa.tensor_tensor(dst=old_MU, data1=old_MU, data2=inverse_MU, op=nl.multiply)  # VectorE
    for u in range(num_units):
        h, start, rows = block[u]
        weights = (new_MU[0:rows, u : u + 1], old_MU[0:rows, u : u + 1])
        o_ME = merged_output(acc[u], weights, places["carry"], (b, h, start, rows))
        nisa.dma_copy(dst=rows_of(places["o"], b, h, start, rows), src=o_ME)  # DMA


def sums(acc, block):
    """l of every row of a block, out of the last columns of the accumulators, [128, units]."""
    l_MU = nl.ndarray((ROWS, len(block)), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=l_MU, value=1.0)
    for u in range(len(block)):
        _, _, rows = block[u]
        last = acc[u].shape[1] - 1
        nisa.tensor_copy(dst=l_MU[0:rows, u : u + 1], src=acc[u][:, last : last + 1])  # VectorE
    return l_MU


def seen_top(c_MU, l_MU, factor):
    """f * c, or far below everything where l = 0: such a row saw nothing in this block. VectorE."""
    empty_MU = nl.ndarray(c_MU.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=empty_MU,
        data=l_MU,
        op0=nl.less_equal,
        operand0=0.0,
        op1=nl.multiply,
        operand1=FAR_BELOW,
    )
    seen_MU = nl.ndarray(c_MU.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=seen_MU, data=c_MU, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=empty_MU
    )
    return seen_MU


def carried_lse(carry, b, block):
    """lse of the carry, [128, units]; EMPTY_LSE without one."""
    if len(carry) > 0:
        return load_row_values(carry[1], b, block, EMPTY_LSE)
    carried_MU = nl.ndarray((ROWS, len(block)), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=carried_MU, value=EMPTY_LSE)
    return carried_MU


def exp_difference(a_MU, top_MU):
    """exp(a - top), fp32."""
    difference_MU = nl.ndarray(a_MU.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=difference_MU, data1=a_MU, data2=top_MU, op=nl.subtract)  # VectorE
    weight_MU = nl.ndarray(a_MU.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=weight_MU, op=nl.exp, data=difference_MU)  # ScalarE
    return weight_MU


def merged_output(acc_psum, weights, carry, place):
    """o of one unit: the new part, and the carried one where there is a carry. VectorE."""
    b, h, start, rows = place
    value_dim = acc_psum.shape[1] - 1
    o_ME = nl.ndarray((rows, value_dim), dtype=nl.float32, buffer=nl.sbuf)
    part_psum = acc_psum[:, 0:value_dim]
    nisa.tensor_scalar(dst=o_ME, data=part_psum, op0=nl.multiply, operand0=weights[0])
    if len(carry) > 0:
        old_ME = nl.ndarray((rows, value_dim), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=old_ME, src=rows_of(carry[0], b, h, start, rows))  # DMA
        nisa.scalar_tensor_tensor(
            dst=o_ME, data=old_ME, op0=nl.multiply, operand0=weights[1], op1=nl.add, operand1=o_ME
        )
    return o_ME


def store_lse(place, b, units, top_MT, sum_MT):
    """lse = w + log L of all units: only here does ScalarE change from exp to log."""
    lse_MT = nl.ndarray(top_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse_MT, op=nl.log, data=sum_MT)  # ScalarE
    nisa.tensor_tensor(dst=lse_MT, data1=lse_MT, data2=top_MT, op=nl.add)  # VectorE
    store_row_values(place, b, units, lse_MT)
