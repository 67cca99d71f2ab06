"""Device loops over chunks of a sequence: how often they turn, and what moves with them.

Does: find, from intervals in HBM and at run time, the first and the last chunk of the other side
that some positions see, and give chunks by a loop's variable as places to load from. Does not:
loop. A loop's variable is only ever added to a DMA's address, never to an operand of an engine.

NKI 0.6 and later: nl.fori_loop, and registers as its bounds.
Letters: B batch, S positions with intervals, C chunks of N positions; P partitions.
Source: NKI migration guide, "Migrating from NKI 0.5.0 to NKI 0.6.0" (rules for loops).
"""

import nki.isa as nisa
import nki.language as nl

from .tiles import ROWS

FAR = 16777216.0  # 2**24: an index past every sequence


def batches_of_step(num_batches, num_groups, step):
    """The batch element that each core computes as its item `step` of `my_items`."""
    items_per_core = num_batches * num_groups // nl.num_programs(0)
    batches = []
    for core in range(nl.num_programs(0)):
        batches.append((core * items_per_core + step) // num_groups)
    return batches


def visible_chunks(first_hbm_BS1, stop_hbm_BS1, batches, span, log_size):
    """What these positions see, in chunks of 2**log_size: a register each for first and stop.

    batches: whose positions, of all cores: loops have to turn as often on both (LNC2 rule), so each
    takes the turns that either needs; in the others everything is masked.
    span: (start, count) of positions. Those that see nothing do not count; where all do, the
    registers are equal. Also returns the index at which the first chunk begins, fp32 [1, 1].
    """
    first_1N = row_of(first_hbm_BS1, batches, span)
    stop_1N = row_of(stop_hbm_BS1, batches, span)
    seen_1N = nl.ndarray(first_1N.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=seen_1N, data1=first_1N, data2=stop_1N, op=nl.less)  # VectorE
    nisa.tensor_tensor(dst=stop_1N, data1=stop_1N, data2=seen_1N, op=nl.multiply)  # VectorE
    nisa.scalar_tensor_tensor(  # VectorE: FAR higher where the position sees nothing
        dst=first_1N, data=seen_1N, op0=nl.multiply, operand0=-FAR, op1=nl.add, operand1=first_1N
    )
    nisa.tensor_scalar(dst=first_1N, data=first_1N, op0=nl.add, operand0=FAR)  # VectorE
    ends_12 = nl.ndarray((1, 2), dtype=nl.float32, buffer=nl.sbuf)
    first_11, stop_11 = ends_12[:, 0:1], ends_12[:, 1:2]
    nisa.tensor_reduce(dst=first_11, op=nl.minimum, data=first_1N, axis=1)  # VectorE
    nisa.tensor_reduce(dst=stop_11, op=nl.maximum, data=stop_1N, axis=1)  # VectorE
    nisa.tensor_tensor(dst=first_11, data1=first_11, data2=stop_11, op=nl.minimum)  # VectorE
    last = float(2**log_size - 1)
    nisa.tensor_scalar(dst=stop_11, data=stop_11, op0=nl.add, operand0=last)  # VectorE
    chunks_12 = nl.ndarray((1, 2), dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=chunks_12, src=ends_12)  # VectorE, exact
    nisa.tensor_scalar(  # VectorE
        dst=chunks_12, data=chunks_12, op0=nl.right_shift, operand0=log_size
    )
    lower, upper = nisa.register_alloc(), nisa.register_alloc()
    nisa.register_load(dst=lower, src=chunks_12[:, 0:1])
    nisa.register_load(dst=upper, src=chunks_12[:, 1:2])
    nisa.tensor_copy(dst=first_11, src=chunks_12[:, 0:1])  # VectorE
    origin_11 = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=origin_11, data=first_11, op0=nl.multiply, operand0=2.0**log_size)
    return lower, upper, origin_11


def row_of(hbm_BS1, batches, span):
    """Some numbers of these batch elements side by side on one partition, fp32 [1, N]."""
    start, count = span
    out_1N = nl.ndarray((1, len(batches) * count), dtype=nl.float32, buffer=nl.sbuf)
    for i in range(len(batches)):
        offset = batches[i] * hbm_BS1.shape[1] + start
        src = hbm_BS1.ap(pattern=[[1, 1], [1, count]], offset=offset)
        nisa.dma_copy(dst=out_1N[:, i * count : (i + 1) * count], src=src)  # DMA
    return out_1N


def on_all_partitions(value_11):
    """One fp32 number on every partition, [128, 1]."""
    ones_1P = nl.ndarray((1, ROWS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones_1P, value=1.0)
    psum_P1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=psum_P1, stationary=ones_1P, moving=value_11)  # TensorE  1P,11->P1
    value_P1 = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=value_P1, src=psum_P1)  # VectorE
    return value_P1


def in_chunks(hbm_BHSD, size):
    """[B, H, S, D] in HBM as [B, H, C, size, D], as `moving_chunk` takes it."""
    batches, heads, length, width = hbm_BHSD.shape
    return hbm_BHSD.reshape((batches, heads, length // size, size, width))


def bounds_of_chunk(bounds, b, size, index):
    """First and stop of the positions of a chunk, fp32 [128, size / 128] each.

    bounds: two HBM tensors [B, S, 1]; index: the loop's variable.
    """
    out = []
    for i in range(2):
        batches, length, _ = bounds[i].shape
        chunks_BCN = bounds[i].reshape((batches, length // size, size))
        src = chunks_BCN.ap(
            pattern=[[1, ROWS], [ROWS, size // ROWS]],
            offset=b * length,
            scalar_offset=index,
            indirect_dim=1,
        )
        bound_PT = nl.ndarray((ROWS, size // ROWS), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=bound_PT, src=src)  # DMA
        out.append(bound_PT)
    return out[0], out[1]
