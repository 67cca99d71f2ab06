"""Who sees whom: static masks cut by affine_select, and run-time intervals, in both orientations.

Static masks are compile-time words; tiles that nothing can see are never issued.

    "full"      every row sees every key
    "causal"    row i sees keys 0..i        (as many keys as rows)
    "strict"    row i sees keys 0..i-1
    "interval"  row i sees keys first[i] <= j < stop[i]; run-time numbers, nothing is recompiled for
                others. Windows, causal offsets, packed documents and their combinations.

An interval mask comes as four HBM tensors of fp32 indices (exact below 2^24): per query the keys
that it sees, per key the queries that see it. Scores exist in two orientations, and each needs the
bounds that lie on its partitions: [queries, keys] those of the queries, [keys, queries] those of
the keys. From gen3 range_select compares and fills in one pass; gen2 builds a predicate.

Letters: M query rows, J keys, N columns; P either on partitions.
"""

import nki.isa as nisa
import nki.language as nl

from .tiles import ROWS, is_gen2, spans

MASKED_SCORE = -1.0e30  # in fp32 tiles only; finite, so that no NaN can come of it


def check_mask(mask, num_rows, num_keys, bounds):
    """What the host checks is asserted once more, as no mask may be dropped in silence."""
    assert mask == "full" or mask == "causal" or mask == "strict" or mask == "interval", mask
    assert (mask == "interval") == (len(bounds) > 0), "bounds go with the mask interval"
    if mask == "causal" or mask == "strict":
        assert num_rows == num_keys, "as many keys as rows"


def reachable(mask, row_stop, key_start, num_keys):
    """How many of the keys from key_start can be seen by rows that end before row_stop."""
    if mask == "causal" or mask == "strict":
        return min(num_keys, row_stop - key_start)
    return num_keys


def on_diagonal(mask, row_start, key_start, num_keys):
    """Whether these keys include rows' own positions, so that a triangle has to be cut."""
    return (mask == "causal" or mask == "strict") and key_start + num_keys > row_start


def cut_future_keys(tile_MN, mask, first_gap, fill):
    """Fill what lies past the diagonal in [queries, keys], in place. GpSimdE, SBUF.

    first_gap: position of the first row minus that of the first key. Row m keeps column n where
    first_gap + m - n >= 0 (causal) or >= 1 (strict).
    """
    offset = first_gap
    if mask == "strict":
        offset = first_gap - 1
    nisa.affine_select(
        dst=tile_MN,
        pattern=[[-1, tile_MN.shape[1]]],
        offset=offset,
        channel_multiplier=1,
        on_true_tile=tile_MN,
        on_false_value=fill,
        cmp_op=nl.greater_equal,
    )


def cut_past_queries(tile_JN, mask, first_gap, fill):
    """The same for [keys, queries]: partition j keeps column n where first_gap + n - j >= 0."""
    offset = first_gap
    if mask == "strict":
        offset = first_gap - 1
    nisa.affine_select(
        dst=tile_JN,
        pattern=[[1, tile_JN.shape[1]]],
        offset=offset,
        channel_multiplier=-1,
        on_true_tile=tile_JN,
        on_false_value=fill,
        cmp_op=nl.greater_equal,
    )


def load_bounds(first_hbm_BS1, stop_hbm_BS1, b):
    """Bounds of one batch element as two fp32 [128, tiles]; past a ragged end they show nothing."""
    tiles = spans(first_hbm_BS1.shape[1], ROWS)
    first_PT = nl.ndarray((ROWS, len(tiles)), dtype=nl.float32, buffer=nl.sbuf)
    stop_PT = nl.ndarray((ROWS, len(tiles)), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=first_PT, value=0.0)
    nisa.memset(dst=stop_PT, value=0.0)
    for t in range(len(tiles)):
        start, rows = tiles[t]
        first_hbm = first_hbm_BS1[b, start : start + rows, :]
        stop_hbm = stop_hbm_BS1[b, start : start + rows, :]
        nisa.dma_copy(dst=first_PT[0:rows, t : t + 1], src=first_hbm)  # DMA
        nisa.dma_copy(dst=stop_PT[0:rows, t : t + 1], src=stop_hbm)  # DMA
    return first_PT, stop_PT


def make_indices():
    """gen2: 0, 1, ... 511 in fp32 on every partition, for comparisons; later chips need none."""
    if not is_gen2():
        return None
    count_PN = nl.ndarray((ROWS, 512), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=count_PN, pattern=[[1, 512]], offset=0, channel_multiplier=0)  # GpSimdE
    indices_PN = nl.ndarray((ROWS, 512), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=indices_PN, src=count_PN)  # VectorE
    return indices_PN


def inside(dst_PN, indices_PN, first_P1, stop_P1, start):
    """dst = 1 where first <= start + column < stop, else 0; any integer dtype. VectorE, gen2."""
    ones_PN = nl.ndarray(dst_PN.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=ones_PN,
        data=indices_PN,
        op0=nl.add,
        operand0=float(start),
        op1=nl.greater_equal,
        operand1=first_P1,
    )
    below_PN = nl.ndarray(dst_PN.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=below_PN,
        data=indices_PN,
        op0=nl.add,
        operand0=float(start),
        op1=nl.less,
        operand1=stop_P1,
    )
    nisa.tensor_tensor(dst=dst_PN, data1=ones_PN, data2=below_PN, op=nl.multiply)


def keep_inside(dst_PN, data_PN, first_P1, stop_P1, start):
    """dst = data inside the interval, the least fp32 outside. VectorE, from gen3."""
    nisa.range_select(
        dst=dst_PN,
        on_true_tile=data_PN,
        comp_op0=nl.greater_equal,
        comp_op1=nl.less,
        bound0=first_P1,
        bound1=stop_P1,
        range_start=start,
    )
