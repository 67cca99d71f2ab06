"""Ring attention forward on the device itself: all steps of all ranks in one program.

Every rank holds its queries and passes its keys and values round the ring. Each step

    issue the permute that brings the next keys and values (two HBM buffers, K and V in one message)
    compute the present ones, merged into o and statistics in HBM: the carry of `flash_fwd`

so that the transfer of step i + 1 has the whole computation of step i to hide behind. From gen3
(trn2), one core per rank or two that share the heads (LNC2), NKI 0.3 and later (nki.collectives).

Letters: N ranks; B batch, H query heads, G key/value heads, C chunks, S rows of a chunk, D head dim
of q and k, E of v. Schedule: Note [Zigzag] in ring_steps.py. Precision: as flash_fwd.py; o and the
statistics stay fp32 from the first step to the last.
"""

import nki
import nki.collectives as ncc
import nki.language as nl

from .flash_fwd import rectangle
from .ring_steps import (
    load_sides,
    make_buffers,
    pack,
    place_of,
    rectangles,
    send_on,
    side_of,
)
from .tiles import make_identity, my_items, query_units

NKI_SINCE = "0.3"  # nki.collectives, with channel_ids


@nki.jit
def ring_fwd(q_BHCSD, k_BGCSD, v_BGCSE, sides_NN, groups, mask, scale, softcap=0.0):
    """Attention of this rank's queries over the keys of all ranks of its group.

    Args:
        q_BHCSD: HBM [B, H, C, S, D]; C = 2 (the zigzag chunks) for "causal", 1 for "full".
        k_BGCSD, v_BGCSE: HBM [B, G, C, S, D] and [B, G, C, S, E], q's dtype.
        sides_NN: HBM int32 [N, N], 1 where the column's rank comes after the row's, else 0.
        groups: tuple of tuples of rank numbers, all of length N.
        mask: "causal" or "full"; scale, softcap: as in `flash_fwd`.

    Returns:
        o [B, H, C, S, E] and lse [B, H, C, S, 1], fp32.
    """
    batches, heads, chunks, num_rows, head_dim = q_BHCSD.shape
    kv_heads, value_dim = k_BGCSD.shape[1], v_BGCSE.shape[4]
    o_shape = (batches, heads, chunks, num_rows, value_dim)
    lse_shape = (batches, heads, chunks, num_rows, 1)
    statistics_shape = (batches, heads, chunks, num_rows, 2)
    o_hbm = nl.ndarray(o_shape, dtype=nl.float32, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray(lse_shape, dtype=nl.float32, buffer=nl.shared_hbm)
    statistics_hbm = nl.ndarray(statistics_shape, dtype=nl.float32, buffer=nl.private_hbm)
    group, size = ncc.ReplicaGroup(groups), len(groups[0])
    eyes = (make_identity(q_BHCSD.dtype), make_identity(nl.bfloat16))
    items = my_items(batches, kv_heads)
    kv = make_buffers(k_BGCSD, v_BGCSE, k_BGCSD.dtype, "kv", items)
    pack(kv[0], k_BGCSD, v_BGCSE, items)
    sides_N1 = load_sides(sides_NN, group)
    for step in range(size):
        here = kv[step % 2]
        if step < size - 1:
            send_on(here, kv[(step + 1) % 2], group)
        side_11 = side_of(sides_N1, group, step)
        parts = rectangles(mask, step)
        for p in range(len(parts)):
            query_chunk, key_chunk, part_mask, is_first, _ = parts[p]
            options = {"mask": part_mask, "scale": scale, "softcap": softcap, "shift": "row_max"}
            places = {
                "q": place_of(q_BHCSD, query_chunk, side_11, 0, head_dim),
                "k": place_of(here, key_chunk, side_11, 0, head_dim),
                "v": place_of(here, key_chunk, side_11, head_dim, value_dim),
                "o": place_of(o_hbm, query_chunk, side_11, 0, value_dim),
                "lse": place_of(lse_hbm, query_chunk, side_11, 0, 1),
                "statistics": place_of(statistics_hbm, query_chunk, side_11, 0, 2),
                "carry": (),
            }
            if not is_first:
                places["carry"] = (places["o"], places["statistics"])
            for i in range(len(items)):
                b, g = items[i]
                places["k"]["pair"], places["v"]["pair"] = (0, i), (0, i)
                units = query_units(heads, kv_heads, g, num_rows)
                rectangle(places, b, g, units, (), options, eyes)
    return o_hbm, lse_hbm
