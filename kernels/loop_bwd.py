"""Flash attention backward under an interval mask, skipping at run time what nobody sees.

The mathematics and the phases are those of flash_bwd.py; what differs is that query rows come by
device loops, which turn from the first to the last row tile that sees a tile of keys, as the
intervals of these keys say when the kernel runs:

    for each tile of 512 keys (256 where D or E is over 128)                    (unrolled)
        first, stop = the row tiles that see it                                 registers
        for tile in first .. stop:                                              device loop
            for each query head of the group: p, ds; dv, dk += ...; dq += ...
        write dk and dv, the carry added

So the program's length depends on the number of keys alone. The price: rows are loaded and
transposed for every key tile, dk and dv move from PSUM to SBUF after every turn, and dq, which no
engine can address by a loop's variable, is read from and written to HBM in every turn.

What moves: the addresses of DMA; key indices are the same in every turn.

NKI 0.6 and later. Letters and precision: flash_bwd.py.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .flash_bwd import key_tile, load_keys, make_query_side, store_key_gradient
from .loops import batches_of_step, bounds_of_chunk, in_chunks, visible_chunks
from .masks import make_indices
from .tiles import (
    ROWS,
    WIDTH,
    chunk,
    make_identity,
    moving_chunk,
    my_items,
    rows_of,
    spans,
    whole,
)

NKI_SINCE = "0.6"  # nl.fori_loop
LOG_ROWS = 7
MOVING = ("do", "q", "lse", "delta", "dq")  # what lies along the queries


@nki.jit
def loop_bwd(
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
        do_BHSE, q_BHSD, k_BGKD, v_BGKE, lse_BHS1, delta_BHS1, scale, softcap, carry: as
            `flash_bwd` takes them; S a multiple of 128 and K of 512.
        mask: "interval".
        bounds: four HBM fp32 tensors, as `flash_fwd` takes them.

    Returns:
        dq [B, H, S, D], dk [B, G, K, D] and dv [B, G, K, E], fp32, as `flash_bwd`.
    """
    assert mask == "interval", "static masks are skipped at compile time, by flash_bwd"
    assert q_BHSD.shape[2] % ROWS == 0, "whole tiles of rows"
    assert k_BGKD.shape[2] % WIDTH == 0, "whole tiles of keys"
    num_batches, num_groups = k_BGKD.shape[0], k_BGKD.shape[1]
    dq_hbm = nl.ndarray(q_BHSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dk_hbm = nl.ndarray(k_BGKD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dv_hbm = nl.ndarray(v_BGKE.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    options = {"mask": mask, "scale": scale, "softcap": softcap}
    identity_PP = make_identity(q_BHSD.dtype)
    rows = {"do": do_BHSE, "q": q_BHSD, "lse": lse_BHS1, "delta": delta_BHS1, "dq": dq_hbm}
    for name in MOVING:
        rows[name] = in_chunks(rows[name], ROWS)
    width = WIDTH
    if max(q_BHSD.shape[3], v_BGKE.shape[3]) > ROWS:
        width = WIDTH // 2
    keys = {"k": in_chunks(k_BGKD, width), "v": in_chunks(v_BGKE, width)}
    places = {"dk": whole(dk_hbm), "dv": whole(dv_hbm), "dk_in": (), "dv_in": (), "dq_in": ()}
    if len(carry) > 0:
        places["dq_in"] = (whole(carry[0]),)
    if len(carry) > 1:
        places["dk_in"], places["dv_in"] = (whole(carry[1]),), (whole(carry[2]),)
    heads = q_BHSD.shape[1] // num_groups
    items = my_items(num_batches, num_groups)
    for i in range(len(items)):
        b, g = items[i]
        for h in range(g * heads, (g + 1) * heads):
            begin_dq(whole(dq_hbm), places["dq_in"], b, h)
        batches = batches_of_step(num_batches, num_groups, i)
        rectangle(places, rows, keys, (b, g, heads, batches), bounds, options, identity_PP)
    return dq_hbm, dk_hbm, dv_hbm


def begin_dq(place, carried, b, h):
    """dq of one head as earlier blocks left it, or zero."""
    zero_MD = nl.ndarray((ROWS, place["width"]), dtype=nl.float32, buffer=nl.sbuf)
    if len(carried) == 0:
        nisa.memset(dst=zero_MD, value=0.0)
    tiles = spans(place["rows"], ROWS)
    for t in range(len(tiles)):
        start, count = tiles[t]
        src = zero_MD[0:count, :]
        if len(carried) > 0:
            src = rows_of(carried[0], b, h, start, count)
        nisa.dma_copy(dst=rows_of(place, b, h, start, count), src=src)  # DMA


def rectangle(places, rows, keys, at, bounds, options, identity_PP):
    """The query heads of one group over one rectangle of scores, from HBM to HBM."""
    b, g, heads, batches = at
    pair = (b, g, heads)
    k_hbm, v_hbm = keys["k"], keys["v"]
    _, _, num_tiles, width, head_dim = k_hbm.shape
    indices_PN = make_indices()
    for tile in range(num_tiles):
        here = {
            "k": chunk(k_hbm, tile, 0, head_dim),
            "v": chunk(v_hbm, tile, 0, v_hbm.shape[4]),
        }
        loaded = load_keys(here, b, g, identity_PP)
        start = tile * width
        turns = visible_chunks(bounds[2], bounds[3], batches, (start, width), LOG_ROWS)
        limits = (bounds[0:2], float(start), indices_PN)
        dk_JND, dv_JNE = sum_gradients(rows, loaded, pair, turns, limits, options, identity_PP)
        place = (b, g, (start, width))
        store_key_gradient(places["dk"], places["dk_in"], dk_JND, place, options["scale"])
        store_key_gradient(places["dv"], places["dv_in"], dv_JNE, place, 1.0)


def sum_gradients(rows, keys, at, turns, limits, options, identity_PP):
    """dk and dv of one key tile, fp32 in SBUF, and dq added to in HBM: the device loop.

    limits: the bounds of queries in HBM, the index of the first key, and gen2's indices.
    """
    b, g, heads = at
    head_dim, value_dim = keys["dims"]
    num_tiles = keys["count"] // ROWS
    dk_JND = nl.ndarray((ROWS, num_tiles, head_dim), dtype=nl.float32, buffer=nl.sbuf)
    dv_JNE = nl.ndarray((ROWS, num_tiles, value_dim), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=dk_JND, value=0.0)
    nisa.memset(dst=dv_JNE, value=0.0)
    units = []
    for h in range(g * heads, (g + 1) * heads):
        units.append((h, 0, ROWS))

    def turn(tile):
        places = {}
        for name in MOVING:
            places[name] = moving_chunk(rows[name], tile, 0, rows[name].shape[4])
        places["dq_in"] = (places["dq"],)
        first_M1, stop_M1 = bounds_of_chunk(limits[0], b, ROWS, tile)
        for bound_M1 in (first_M1, stop_M1):
            nisa.tensor_scalar(  # VectorE
                dst=bound_M1, data=bound_M1, op0=nl.subtract, operand0=limits[1]
            )
        here = ((first_M1, stop_M1), limits[2])
        side = make_query_side(places, units)
        dk_psum_JND, dv_psum_JNE = key_tile(places, b, side, keys, here, 0, options, identity_PP)
        nisa.tensor_tensor(dst=dk_JND, data1=dk_JND, data2=dk_psum_JND, op=nl.add)  # VectorE
        nisa.tensor_tensor(dst=dv_JNE, data1=dv_JNE, data2=dv_psum_JNE, op=nl.add)  # VectorE

    nl.fori_loop(turns[0], turns[1], turn)
    return dk_JND, dv_JNE
