"""The end of a block of queries: its accumulators merged with the carry, o and lse written.

    w = max(f * c, lse_in),  L = exp(f * c - w) l + exp(lse_in - w)
    o = (exp(f * c - w) acc + exp(lse_in - w) o_in) / L,   lse = w + log L

Letters as in flash_fwd.py: M query rows on partitions, U units of a block, T units of a group.
"""

import nki.isa as nisa
import nki.language as nl

from .tiles import EMPTY_LSE, ROWS, load_row_values, rows_of, store_row_values

FAR_BELOW = -1.0e31  # f * c of a row that saw nothing: below every lse and EMPTY_LSE


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
