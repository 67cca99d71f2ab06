"""Ring attention backward on the device itself: keys, values and their gradients go round.

Every rank holds its queries, do, lse and delta. Keys and values travel as in the forward; the fp32
gradients of a rank's keys and values follow them, one message of dk and dv, and are home after a
full turn. Each step

    issue the permute that brings the next keys and values
    compute the present rectangles: dq is added in HBM here, dk and dv in the message that is here
    issue the permute that passes that message on

From gen3 (trn2), one core per rank or two that share the heads (LNC2), NKI 0.3 and later
(nki.collectives).
Letters and schedule: ring_steps.py. Precision: as flash_bwd.py, all sums fp32.
"""

import nki
import nki.collectives as ncc
import nki.language as nl

from .flash_bwd import rectangle
from .ring_steps import (
    load_sides,
    make_buffers,
    pack,
    place_of,
    rectangles,
    send_on,
    side_of,
    unpack,
)
from .tiles import make_identity, my_items, query_units

NKI_SINCE = "0.3"  # nki.collectives, with channel_ids


@nki.jit
def ring_bwd(
    do_BHCSE,
    q_BHCSD,
    k_BGCSD,
    v_BGCSE,
    lse_BHCS1,
    delta_BHCS1,
    sides_NN,
    groups,
    mask,
    scale,
    softcap=0.0,
):
    """Gradients of this rank's queries, keys and values over the keys and queries of all ranks.

    Args:
        do_BHCSE, q_BHCSD, k_BGCSD, v_BGCSE, sides_NN, groups, mask, scale, softcap: as in
            `ring_fwd`; do in q's dtype.
        lse_BHCS1, delta_BHCS1: HBM [B, H, C, S, 1] fp32, over all ranks; delta = rowsum(do * o).

    Returns:
        dq [B, H, C, S, D], dk [B, G, C, S, D] and dv [B, G, C, S, E], fp32.
    """
    batches, heads, _, num_rows, head_dim = q_BHCSD.shape
    kv_heads, value_dim = k_BGCSD.shape[1], v_BGCSE.shape[4]
    dq_hbm = nl.ndarray(q_BHCSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dk_hbm = nl.ndarray(k_BGCSD.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    dv_hbm = nl.ndarray(v_BGCSE.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    group, size = ncc.ReplicaGroup(groups), len(groups[0])
    identity_PP = make_identity(q_BHCSD.dtype)
    items = my_items(batches, kv_heads)
    kv = make_buffers(k_BGCSD, v_BGCSE, k_BGCSD.dtype, "kv", items)
    grads = make_buffers(k_BGCSD, v_BGCSE, nl.float32, "grads", items)
    pack(kv[0], k_BGCSD, v_BGCSE, items)
    sides_N1 = load_sides(sides_NN, group)
    for step in range(size):
        here, sums = kv[step % 2], grads[step % 2]
        if step < size - 1:
            send_on(here, kv[(step + 1) % 2], group)
        side_11 = side_of(sides_N1, group, step)
        parts = rectangles(mask, step)
        for p in range(len(parts)):
            query_chunk, key_chunk, part_mask, rows_first, keys_first = parts[p]
            options = {"mask": part_mask, "scale": scale, "softcap": softcap}
            places = {
                "do": place_of(do_BHCSE, query_chunk, side_11, 0, value_dim),
                "q": place_of(q_BHCSD, query_chunk, side_11, 0, head_dim),
                "lse": place_of(lse_BHCS1, query_chunk, side_11, 0, 1),
                "delta": place_of(delta_BHCS1, query_chunk, side_11, 0, 1),
                "k": place_of(here, key_chunk, side_11, 0, head_dim),
                "v": place_of(here, key_chunk, side_11, head_dim, value_dim),
                "dq": place_of(dq_hbm, query_chunk, side_11, 0, head_dim),
                "dk": place_of(sums, key_chunk, side_11, 0, head_dim),
                "dv": place_of(sums, key_chunk, side_11, head_dim, value_dim),
                "dq_in": (),
                "dk_in": (),
                "dv_in": (),
            }
            if not rows_first:
                places["dq_in"] = (places["dq"],)
            if not keys_first:
                places["dk_in"], places["dv_in"] = (places["dk"],), (places["dv"],)
            for i in range(len(items)):
                b, g = items[i]
                places["k"]["pair"], places["v"]["pair"] = (0, i), (0, i)
                places["dk"]["pair"], places["dv"]["pair"] = (0, i), (0, i)  # and those carried
                units = query_units(heads, kv_heads, g, num_rows)
                rectangle(places, b, g, units, (), options, identity_PP)
        if size > 1:
            send_on(sums, grads[(step + 1) % 2], group)
    home = grads[0]
    if size > 1:
        home = grads[size % 2]
    unpack(dk_hbm, dv_hbm, home, items)
    return dq_hbm, dk_hbm, dv_hbm
