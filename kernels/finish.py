"""The end of a block of queries: its accumulators merged with the carry, o and lse written.

    w = max(f * c, w_in),  L = exp(f * c - w) l + exp(w_in - w) L_in
    o = (exp(f * c - w) acc + exp(w_in - w) L_in o_in) / L,   lse = w + log L

w and L are the statistics of a row; they lie side by side and move in one DMA.

Letters as in flash_fwd.py: M query rows on partitions, U units of a block, T units of a group.
"""

import nki.isa as nisa
import nki.language as nl

from .tiles import EMPTY_LSE, ROWS, rows_of, store_units

FAR_BELOW = -1.0e31  # f * c of a row that saw nothing: below every lse and EMPTY_LSE


def finish(acc, c_MU, b, block, results, options):
    """Merge the accumulators of a block with the carry and write o; keep w and L."""
    places, statistics_MT2, first_unit = results
    factor = options["scale"]
    if options["softcap"] != 0.0:
        factor = options["softcap"]
    num_units = len(block)
    l_MU = sums(acc, block)
    seen_MU = seen_top(c_MU, l_MU, factor)
    carried_MU2 = carried_statistics(places["carry"], b, block)
    old_top_MU, old_sum_MU = carried_MU2[:, :, 0], carried_MU2[:, :, 1]
    top_MU = statistics_MT2[:, first_unit : first_unit + num_units, 0]
    sum_MU = statistics_MT2[:, first_unit : first_unit + num_units, 1]
    nisa.tensor_tensor(dst=top_MU, data1=seen_MU, data2=old_top_MU, op=nl.maximum)  # VectorE
    new_MU = exp_difference(seen_MU, top_MU)
    old_MU = exp_difference(old_top_MU, top_MU)
    nisa.tensor_tensor(dst=old_MU, data1=old_MU, data2=old_sum_MU, op=nl.multiply)  # VectorE
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


def carried_statistics(carry, b, block):
    """w and L of the carry, [128, units, 2]; without one those of rows that saw nothing."""
    carried_MU2 = nl.ndarray((ROWS, len(block), 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=carried_MU2[:, :, 0], value=EMPTY_LSE)
    nisa.memset(dst=carried_MU2[:, :, 1], value=1.0)
    if len(carry) > 0:
        for u in range(len(block)):
            h, start, rows = block[u]
            src = rows_of(carry[1], b, h, start, rows)
            nisa.dma_copy(dst=carried_MU2[0:rows, u, :], src=src)  # DMA
    return carried_MU2


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


def store_statistics(places, b, units, statistics_MT2):
    """w, L and lse = w + log L of all units: only here does ScalarE change from exp to log."""
    top_MT, sum_MT = statistics_MT2[:, :, 0], statistics_MT2[:, :, 1]
    lse_MT1 = nl.ndarray((ROWS, len(units), 1), dtype=nl.float32, buffer=nl.sbuf)
    lse_MT = lse_MT1[:, :, 0]
    nisa.activation(dst=lse_MT, op=nl.log, data=sum_MT)  # ScalarE
    nisa.tensor_tensor(dst=lse_MT, data1=lse_MT, data2=top_MT, op=nl.add)  # VectorE
    store_units(places["lse"], b, units, lse_MT1)
    store_units(places["statistics"], b, units, statistics_MT2)
