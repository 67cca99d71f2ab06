"""delta = rowsum(do * o), what the backward kernels need to know of the output.

Letters: B batch, H query heads, S query rows, E head dim of v; M <= 128 rows of a tile, T tiles.

    ds = p * (do v^T - delta),   delta_i = sum_j p_ij (do_i . v_j) = do_i . o_i

Precision: do and o in their own dtypes (bf16, fp16 or fp32), product and sum fp32. The rings pass o
as it was returned, rounded to the dtype of q.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .tiles import ROWS, my_items, spans


@nki.jit
def row_delta(do_BHSE, o_BHSE):
    """One number per query row.

    Args:
        do_BHSE, o_BHSE: HBM [B, H, S, E], each bf16, fp16 or fp32; any S, E at most 256.

    Returns:
        delta [B, H, S, 1] fp32.
    """
    num_batches, num_heads, num_rows, _ = do_BHSE.shape
    delta_hbm = nl.ndarray(
        (num_batches, num_heads, num_rows, 1), dtype=nl.float32, buffer=nl.shared_hbm
    )
    items = my_items(num_batches, num_heads)
    tiles = spans(num_rows, ROWS)
    for i in range(len(items)):
        b, h = items[i]
        for t in range(len(tiles)):
            start, count = tiles[t]
            tile_delta(delta_hbm, do_BHSE, o_BHSE, (b, h, start, start + count))
    return delta_hbm


def tile_delta(delta_hbm, do_BHSE, o_BHSE, place):
    """The rows of one tile, from HBM to HBM."""
    b, h, start, stop = place
    shape = (stop - start, do_BHSE.shape[3])
    do_ME = nl.ndarray(shape, dtype=do_BHSE.dtype, buffer=nl.sbuf)
    o_ME = nl.ndarray(shape, dtype=o_BHSE.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=do_ME, src=do_BHSE[b, h, start:stop, :])  # DMA
    nisa.dma_copy(dst=o_ME, src=o_BHSE[b, h, start:stop, :])  # DMA
    product_ME = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=product_ME, data1=do_ME, data2=o_ME, op=nl.multiply)  # VectorE
    delta_M1 = nl.ndarray((stop - start, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=delta_M1, op=nl.add, data=product_ME, axis=1)  # VectorE
    nisa.dma_copy(dst=delta_hbm[b, h, start:stop, :], src=delta_M1)  # DMA
