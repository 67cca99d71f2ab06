"""Flash attention backward over one rectangle of scores: do, q, k, v, lse, delta -> dq, dk, dv.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim of q and k,
E head dim of v; in a tile M <= 128 query rows, N keys (512; 256 where D or E is over 128),
J <= 128 keys; C <= 128 of D or E; U units (row tiles of the query heads of a group).

The mathematics (FlashAttention-2, Dao 2023, algorithm 2), with lse and delta = rowsum(do * o) of
the whole row over all hops:

    x  = scale * q k^T   or   softcap * t,  t = tanh(scale * q k^T / softcap)
    p  = exp(x - lse)
    dv = p^T do
    ds = p * (do v^T - delta)   [* (1 - t^2) with a cap]
    dq = scale * ds k,   dk = scale * ds^T q

Queries lie on partitions here, unlike in the forward: lse and delta are then one number per
partition (free in ScalarE's bias and in VectorE), p and ds are the stationary operands of dv and dk
as they are, and only ds needs transposing, for dq. With keys on partitions two of them would.
Keys are the outer loop: dk and dv of a key tile stay in PSUM while all units pass by; dq gathers in
fp32 in SBUF. What came before (the gradients of earlier blocks) is added on the way in and out.

Precision: q, k, v, do, p and ds are in the input dtype (bf16, fp16 or fp32); scores, do v^T, lse,
delta and all three gradients are fp32. A row with lse <= EMPTY_LSE_LIMIT adds nothing.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .masks import (
    check_mask,
    cut_future_keys,
    inside,
    keep_inside,
    load_bounds,
    make_indices,
    on_diagonal,
    reachable,
)
from .tiles import (
    EMPTY_LSE,
    EMPTY_LSE_LIMIT,
    ROWS,
    WIDTH,
    contract,
    is_gen2,
    lengths_of,
    load_rows,
    make_identity,
    make_pieces,
    my_items,
    query_units,
    rows_of,
    spans,
    transpose,
    transpose_tiles,
    transpose_unit,
    whole,
)


@nki.jit
def flash_bwd(
    do_BHSE,
    q_BHSD,
    k_BGKD,
    v_BGKE,
    lse_BHS1,
    delta_BHS1,
    mask,
    scale,
    softcap=0.0,
    carry=(),
    bounds=(),
):
    """Gradients of one block of attention, added to those of earlier blocks.

    Args:
        do_BHSE, q_BHSD: HBM [B, H, S, E] and [B, H, S, D], bf16, fp16 or fp32; any S; D, E at
            most 256.
        k_BGKD, v_BGKE: HBM [B, G, K, D] and [B, G, K, E], q's dtype; any K, G divides H.
        lse_BHS1, delta_BHS1: HBM [B, H, S, 1] fp32, of the whole row over all blocks.
        mask: "full", "causal", "strict" (the last two need S == K) or "interval".
        scale, softcap: as in the forward kernel.
        carry: () or (dq,) or (dq, dk, dv), HBM fp32, in the shapes of the results.
        bounds: () or, for mask "interval", HBM fp32 tensors as `flash_fwd` takes them; the first
            two, those of queries, are read.

    Returns:
        dq [B, H, S, D], dk [B, G, K, D] and dv [B, G, K, E], fp32, summed over the query heads of
        each group, the carry included.
    """
    num_batches, num_groups = k_BGKD.shape[0], k_BGKD.shape[1]
    check_mask(mask, q_BHSD.shape[2], k_BGKD.shape[2], bounds)
    dq_hbm = nl.ndarray(q_BHSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dk_hbm = nl.ndarray(k_BGKD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dv_hbm = nl.ndarray(v_BGKE.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    options = {"mask": mask, "scale": scale, "softcap": softcap}
    identity_PP = make_identity(q_BHSD.dtype)
    places = {"do": whole(do_BHSE), "q": whole(q_BHSD), "k": whole(k_BGKD), "v": whole(v_BGKE)}
    places["lse"], places["delta"] = whole(lse_BHS1), whole(delta_BHS1)
    places["dq"], places["dk"], places["dv"] = whole(dq_hbm), whole(dk_hbm), whole(dv_hbm)
    places["dq_in"], places["dk_in"], places["dv_in"] = (), (), ()
    if len(carry) > 0:
        places["dq_in"] = (whole(carry[0]),)
    if len(carry) > 1:
        places["dk_in"], places["dv_in"] = (whole(carry[1]),), (whole(carry[2]),)
    items = my_items(num_batches, num_groups)
    for i in range(len(items)):
        b, g = items[i]
        units = query_units(q_BHSD.shape[1], num_groups, g, q_BHSD.shape[2])
        limits = ()
        if len(bounds) > 0:
            limits = (load_bounds(bounds[0], bounds[1], b), make_indices())
        rectangle(places, b, g, units, limits, options, identity_PP)
    return dq_hbm, dk_hbm, dv_hbm


def rectangle(places, b, g, units, limits, options, identity_PP):
    """The query heads of one group over one rectangle of scores, from HBM to HBM.

    places: where "do", "q", "k", "v", "lse", "delta", "dq", "dk", "dv" are, and (nothing, or one)
    "dq_in", "dk_in", "dv_in", to which the gradients are added; see tiles.py.
    """
    keys = load_keys(places, b, g, identity_PP)
    rows = make_query_side(places, units)
    for tile in range(len(keys["wide_tiles"])):
        dk_psum_JND, dv_psum_JNE = key_tile(
            places, b, rows, keys, limits, tile, options, identity_PP
        )
        at = (b, g, keys["wide_tiles"][tile])
        store_key_gradient(places["dk"], places["dk_in"], dk_psum_JND, at, options["scale"])
        store_key_gradient(places["dv"], places["dv_in"], dv_psum_JNE, at, 1.0)


def load_keys(places, b, g, identity_PP):
    """One head's keys and values: transposed, and the keys also by row tile."""
    num_keys, dims = places["k"]["rows"], (places["k"]["width"], places["v"]["width"])
    lengths = lengths_of(spans(num_keys, ROWS))
    k_JTD = load_rows(places["k"], b, g)
    width = WIDTH
    if max(dims[0], dims[1]) > ROWS:
        width = WIDTH // 2  # so that dk and dv of a tile still take one PSUM bank each
    return {
        "kT": transpose_tiles(k_JTD, lengths, identity_PP),
        "vT": transpose_tiles(load_rows(places["v"], b, g), lengths, identity_PP),
        "k": k_JTD,
        "wide_tiles": spans(num_keys, width),
        "count": num_keys,
        "dims": dims,
    }


def make_query_side(places, units):
    """Room for everything about the queries of one group: rows, transposes, -lse, delta and dq."""
    head_dim, value_dim = places["q"]["width"], places["do"]["width"]
    num_units, dtype = len(units), places["q"]["hbm"].dtype
    total = 0
    columns = []
    for u in range(num_units):
        columns.append((total, total + units[u][2]))
        total += units[u][2]
    return {
        "units": units,
        "columns": columns,
        "q": nl.ndarray((ROWS, num_units, head_dim), dtype=dtype, buffer=nl.sbuf),
        "do": nl.ndarray((ROWS, num_units, value_dim), dtype=dtype, buffer=nl.sbuf),
        "qT": make_pieces(head_dim, total, dtype),
        "doT": make_pieces(value_dim, total, dtype),
        "bias": nl.ndarray((ROWS, num_units), dtype=nl.float32, buffer=nl.sbuf),
        "delta": nl.ndarray((ROWS, num_units), dtype=nl.float32, buffer=nl.sbuf),
        "dq": nl.ndarray((ROWS, num_units, head_dim), dtype=nl.float32, buffer=nl.sbuf),
    }


def load_unit(places, b, rows, u, identity_PP):
    """Load one unit; done when the first key tile comes to it, so that work begins at once."""
    h, start, count = rows["units"][u]
    q_MUD, do_MUE, dq_MUD = rows["q"], rows["do"], rows["dq"]
    nisa.dma_copy(dst=q_MUD[0:count, u, :], src=rows_of(places["q"], b, h, start, count))  # DMA
    nisa.dma_copy(dst=do_MUE[0:count, u, :], src=rows_of(places["do"], b, h, start, count))  # DMA
    transpose_unit(rows["qT"], q_MUD, u, rows["columns"][u], identity_PP)
    transpose_unit(rows["doT"], do_MUE, u, rows["columns"][u], identity_PP)
    lse_M1 = nl.ndarray((count, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=lse_M1, src=rows_of(places["lse"], b, h, start, count))  # DMA
    negate_lse(rows["bias"][0:count, u : u + 1], lse_M1)
    delta_M1 = rows["delta"][0:count, u : u + 1]
    nisa.dma_copy(dst=delta_M1, src=rows_of(places["delta"], b, h, start, count))  # DMA
    if len(places["dq_in"]) > 0:
        src = rows_of(places["dq_in"][0], b, h, start, count)
        nisa.dma_copy(dst=dq_MUD[0:count, u, :], src=src)  # DMA
    else:
        nisa.memset(dst=dq_MUD[0:count, u, :], value=0.0)


def negate_lse(bias_M1, lse_M1):
    """-lse, the bias of exp; far below 0 where a row saw nothing, so that its p is 0. VectorE."""
    empty_M1 = nl.ndarray(lse_M1.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=empty_M1,
        data=lse_M1,
        op0=nl.less_equal,
        operand0=EMPTY_LSE_LIMIT,
        op1=nl.multiply,
        operand1=4.0 * EMPTY_LSE,
    )
    nisa.scalar_tensor_tensor(
        dst=bias_M1, data=lse_M1, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=empty_M1
    )


def store_unit(places, b, rows, u):
    """Write dq of one unit, after the last key tile that it sees."""
    h, start, count = rows["units"][u]
    dst = rows_of(places["dq"], b, h, start, count)
    nisa.dma_copy(dst=dst, src=rows["dq"][0:count, u, :])  # DMA


def key_tile(places, b, rows, keys, limits, tile, options, identity_PP):
    """Pass all units by one key tile: returns dk and dv in PSUM, adds into dq."""
    key_start, length = keys["wide_tiles"][tile]
    head_dim, value_dim = keys["dims"]
    num_tiles = len(spans(length, ROWS))
    dk_psum_JND = nl.ndarray((ROWS, num_tiles, head_dim), dtype=nl.float32, buffer=nl.psum)
    dv_psum_JNE = nl.ndarray((ROWS, num_tiles, value_dim), dtype=nl.float32, buffer=nl.psum)
    for u in range(len(rows["units"])):
        _, start, count = rows["units"][u]
        num_keys = reachable(options["mask"], start + count, key_start, length)
        if tile == 0:
            load_unit(places, b, rows, u, identity_PP)
        if num_keys > 0:
            key_span = (key_start, key_start + num_keys)
            p_MN, slope_MN = recompute_p(rows, u, keys, key_span, limits, options)
            ds_MN = score_gradient(rows, u, keys, key_span, p_MN, slope_MN)
            add_key_gradients(dk_psum_JND, dv_psum_JNE, p_MN, ds_MN, rows, u)
            add_query_gradient(rows, u, keys, key_start, ds_MN, options["scale"], identity_PP)
            next_start = key_start + length
            if (
                reachable(options["mask"], start + count, next_start, keys["count"] - next_start)
                <= 0
            ):
                store_unit(places, b, rows, u)
    return dk_psum_JND, dv_psum_JNE


def recompute_p(rows, u, keys, key_span, limits, options):
    """p [M, N] = exp(x - lse) in the input dtype, and p * (1 - t^2) in fp32 with a cap, else p."""
    count = rows["units"][u][2]
    shape = (count, key_span[1] - key_span[0])
    s_psum_MN = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
    contract(s_psum_MN, rows["qT"], rows["columns"][u], keys["kT"], key_span)
    x_MN, factor, softcap = s_psum_MN, options["scale"], options["softcap"]
    if softcap != 0.0:
        t_MN = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=t_MN, op=nl.tanh, data=s_psum_MN, scale=factor / softcap)  # ScalarE
        x_MN, factor = t_MN, softcap
    p_MN = masked_exp(x_MN, factor, rows, u, key_span[0], limits, options["mask"])
    if softcap == 0.0:
        return p_MN, p_MN
    slope_MN = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=slope_MN, data1=t_MN, data2=t_MN, op=nl.multiply)  # VectorE
    nisa.tensor_scalar(  # VectorE
        dst=slope_MN, data=slope_MN, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=1.0
    )
    nisa.tensor_tensor(dst=slope_MN, data1=slope_MN, data2=p_MN, op=nl.multiply)  # VectorE
    return p_MN, slope_MN


def masked_exp(x_MN, factor, rows, u, key_start, limits, mask):
    """exp(factor * x - lse) in the input dtype, 0 where the row does not see the key."""
    _, start, count = rows["units"][u]
    num_keys = x_MN.shape[1]
    if mask == "interval":
        first_MT, stop_MT = limits[0]
        t = start // ROWS
        first_M1, stop_M1 = first_MT[0:count, t : t + 1], stop_MT[0:count, t : t + 1]
        if not is_gen2():
            kept_MN = nl.ndarray(x_MN.shape, dtype=nl.float32, buffer=nl.sbuf)
            keep_inside(kept_MN, x_MN, first_M1, stop_M1, key_start)
            x_MN = kept_MN
    p_MN = nl.ndarray(x_MN.shape, dtype=rows["q"].dtype, buffer=nl.sbuf)
    bias_M1 = rows["bias"][0:count, u : u + 1]
    nisa.activation(dst=p_MN, op=nl.exp, data=x_MN, bias=bias_M1, scale=factor)  # ScalarE
    if mask == "interval" and is_gen2():
        seen_MN = nl.ndarray(x_MN.shape, dtype=nl.uint8, buffer=nl.sbuf)
        inside(seen_MN, limits[1][0:count, 0:num_keys], first_M1, stop_M1, key_start)
        kept_MN = nl.ndarray(x_MN.shape, dtype=p_MN.dtype, buffer=nl.sbuf)
        nisa.memset(dst=kept_MN, value=0.0)
        nisa.tensor_copy_predicated(dst=kept_MN, src=p_MN, predicate=seen_MN)  # VectorE
        return kept_MN
    if on_diagonal(mask, start, key_start, num_keys):
        square = max(0, start - key_start)
        triangle_MN = p_MN[:, square:num_keys]
        cut_future_keys(triangle_MN, mask, start - key_start - square, 0.0)
    return p_MN


def score_gradient(rows, u, keys, key_span, p_MN, slope_MN):
    """ds [M, N] = p * (do v^T - delta), without the scale, in the input dtype."""
    _, _, count = rows["units"][u]
    dp_psum_MN = nl.ndarray(p_MN.shape, dtype=nl.float32, buffer=nl.psum)
    contract(dp_psum_MN, rows["doT"], rows["columns"][u], keys["vT"], key_span)
    ds_MN = nl.ndarray(p_MN.shape, dtype=p_MN.dtype, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(  # VectorE
        dst=ds_MN,
        data=dp_psum_MN,
        op0=nl.subtract,
        operand0=rows["delta"][0:count, u : u + 1],
        op1=nl.multiply,
        operand1=slope_MN,
    )
    return ds_MN


def add_key_gradients(dk_psum_JND, dv_psum_JNE, p_MN, ds_MN, rows, u):
    """dv += p^T do and dk += ds^T q, per 128 keys, accumulated in PSUM over all units."""
    count = p_MN.shape[0]
    q_MD = rows["q"][0:count, u, :]
    do_ME = rows["do"][0:count, u, :]
    tiles = spans(p_MN.shape[1], ROWS)
    for j in range(len(tiles)):
        first, num_keys = tiles[j]
        p_MJ = p_MN[:, first : first + num_keys]
        ds_MJ = ds_MN[:, first : first + num_keys]
        dv_psum_JE = dv_psum_JNE[0:num_keys, j, :]
        dk_psum_JD = dk_psum_JND[0:num_keys, j, :]
        nisa.nc_matmul(dst=dv_psum_JE, stationary=p_MJ, moving=do_ME)  # TensorE  MJ,ME->JE
        nisa.nc_matmul(dst=dk_psum_JD, stationary=ds_MJ, moving=q_MD)  # TensorE  MJ,MD->JD


def add_query_gradient(rows, u, keys, key_start, ds_MN, scale, identity_PP):
    """dq += scale * ds k, summed over the tile in PSUM and over the tiles in SBUF."""
    count = ds_MN.shape[0]
    dq_psum_MD = nl.ndarray((count, keys["dims"][0]), dtype=nl.float32, buffer=nl.psum)
    tiles = spans(ds_MN.shape[1], ROWS)
    for j in range(len(tiles)):
        first, num_keys = tiles[j]
        dsT_JM = nl.ndarray((num_keys, count), dtype=ds_MN.dtype, buffer=nl.sbuf)
        transpose(dsT_JM, ds_MN[:, first : first + num_keys], identity_PP)
        k_JD = keys["k"][0:num_keys, (key_start + first) // ROWS, :]
        nisa.nc_matmul(dst=dq_psum_MD, stationary=dsT_JM, moving=k_JD)  # TensorE  JM,JD->MD
    dq_MD = rows["dq"][0:count, u, :]
    nisa.scalar_tensor_tensor(  # VectorE
        dst=dq_MD, data=dq_psum_MD, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=dq_MD
    )


def store_key_gradient(place, carried, d_psum_JND, at, factor):
    """Write factor * d of one key tile, plus what came before, through SBUF to HBM."""
    b, g, wide_tile = at
    tiles = spans(wide_tile[1], ROWS)
    for j in range(len(tiles)):
        first, num_keys = tiles[j]
        start = wide_tile[0] + first
        d_JD = nl.ndarray((num_keys, d_psum_JND.shape[2]), dtype=nl.float32, buffer=nl.sbuf)
        d_psum_JD = d_psum_JND[0:num_keys, j, :]
        if len(carried) > 0:
            nisa.dma_copy(dst=d_JD, src=rows_of(carried[0], b, g, start, num_keys))  # DMA
            nisa.scalar_tensor_tensor(  # VectorE
                dst=d_JD,
                data=d_psum_JD,
                op0=nl.multiply,
                operand0=factor,
                op1=nl.add,
                operand1=d_JD,
            )
        else:
            nisa.tensor_scalar(
                dst=d_JD, data=d_psum_JD, op0=nl.multiply, operand0=factor
            )  # VectorE
        nisa.dma_copy(dst=rows_of(place, b, g, start, num_keys), src=d_JD)  # DMA
