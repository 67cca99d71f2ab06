"""Two partial results of the same query rows over different keys become one.

Letters: B batch, H query heads, S query rows, E head dim of v; M <= 128 rows of a tile, T tiles of
a head.

    w   = max(lse_a, lse_b),   L = exp(lse_a - w) + exp(lse_b - w)
    o   = (exp(lse_a - w) o_a + exp(lse_b - w) o_b) / L,   lse = w + log L

The block kernels need no merge: they carry. This is for results that were computed apart, as when
keys are split over cores. A row that saw nothing has o = 0 and lse = EMPTY_LSE or minus infinity.
It weighs nothing; if both are empty, the result is 0 and EMPTY_LSE, without a NaN: EMPTY_LSE is
finite, so the weights are 1/2 each, and log 2 is lost beside it.

Precision: everything is fp32.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from .tiles import EMPTY_LSE, ROWS, my_items, spans


@nki.jit
def merge(oa_BHSE, lsea_BHS1, ob_BHSE, lseb_BHS1):
    """(o_a, lse_a) and (o_b, lse_b) -> (o, lse).

    Args:
        oa_BHSE, ob_BHSE: HBM [B, H, S, E] fp32, normalised; any S, E at most 256.
        lsea_BHS1, lseb_BHS1: HBM [B, H, S, 1] fp32, natural logarithms.

    Returns:
        o [B, H, S, E] and lse [B, H, S, 1], fp32.
    """
    num_batches, num_heads, num_rows, _ = oa_BHSE.shape
    o_hbm = nl.ndarray(oa_BHSE.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray(lsea_BHS1.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    items = my_items(num_batches, num_heads)
    tiles = spans(num_rows, ROWS)
    for i in range(len(items)):
        b, h = items[i]
        lsea_MT = load_lse(lsea_BHS1, b, h, tiles)
        lseb_MT = load_lse(lseb_BHS1, b, h, tiles)
        lse_MT, a_MT, b_MT = weigh(lsea_MT, lseb_MT)
        for t in range(len(tiles)):
            start, count = tiles[t]
            stop = start + count
            weights = (a_MT[0:count, t : t + 1], b_MT[0:count, t : t + 1])
            sources = (oa_BHSE[b, h, start:stop, :], ob_BHSE[b, h, start:stop, :])
            o_ME = add_weighted(sources, weights)
            nisa.dma_copy(dst=o_hbm[b, h, start:stop, :], src=o_ME)  # DMA
            nisa.dma_copy(dst=lse_hbm[b, h, start:stop, :], src=lse_MT[0:count, t : t + 1])  # DMA
    return o_hbm, lse_hbm


def load_lse(lse_BHS1, b, h, tiles):
    """One head's lse as [128, tiles], EMPTY_LSE for minus infinity and past a ragged end."""
    lse_MT = nl.ndarray((ROWS, len(tiles)), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=lse_MT, value=EMPTY_LSE)
    for t in range(len(tiles)):
        start, count = tiles[t]
        src = lse_BHS1[b, h, start : start + count, :]
        nisa.dma_copy(dst=lse_MT[0:count, t : t + 1], src=src)  # DMA
    nisa.tensor_scalar(dst=lse_MT, data=lse_MT, op0=nl.maximum, operand0=EMPTY_LSE)  # VectorE
    return lse_MT


def weigh(lsea_MT, lseb_MT):
    """lse of the merged rows, and the weight of either part; the weights add up to 1."""
    top_MT = nl.ndarray(lsea_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=top_MT, data1=lsea_MT, data2=lseb_MT, op=nl.maximum)  # VectorE
    a_MT, b_MT = exp_below(lsea_MT, top_MT), exp_below(lseb_MT, top_MT)
    sum_MT = nl.ndarray(top_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=sum_MT, data1=a_MT, data2=b_MT, op=nl.add)  # VectorE
    lse_MT = nl.ndarray(top_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse_MT, op=nl.log, data=sum_MT)  # ScalarE
    nisa.tensor_tensor(dst=lse_MT, data1=lse_MT, data2=top_MT, op=nl.add)  # VectorE
    nisa.reciprocal(dst=sum_MT, data=sum_MT)  # VectorE
    nisa.tensor_tensor(dst=a_MT, data1=a_MT, data2=sum_MT, op=nl.multiply)  # VectorE
    nisa.tensor_tensor(dst=b_MT, data1=b_MT, data2=sum_MT, op=nl.multiply)  # VectorE
    return lse_MT, a_MT, b_MT


def exp_below(lse_MT, top_MT):
    """exp(lse - top), fp32."""
    weight_MT = nl.ndarray(lse_MT.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weight_MT, data1=lse_MT, data2=top_MT, op=nl.subtract)  # VectorE
    nisa.activation(dst=weight_MT, op=nl.exp, data=weight_MT)  # ScalarE
    return weight_MT


def add_weighted(sources, weights):
    """weight_a * o_a + weight_b * o_b of one tile, out of HBM. VectorE."""
    a_ME = nl.ndarray(sources[0].shape, dtype=nl.float32, buffer=nl.sbuf)
    b_ME = nl.ndarray(sources[0].shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=a_ME, src=sources[0])  # DMA
    nisa.dma_copy(dst=b_ME, src=sources[1])  # DMA
    nisa.tensor_scalar(dst=a_ME, data=a_ME, op0=nl.multiply, operand0=weights[0])
    nisa.scalar_tensor_tensor(
        dst=a_ME, data=b_ME, op0=nl.multiply, operand0=weights[1], op1=nl.add, operand1=a_ME
    )
    return a_ME
