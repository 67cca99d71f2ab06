"""GpSimdE and DMA, addresses known at run time, registers."""

import numpy as np
from nki_sim import nisa, nl, psum, sbuf

from . import pair
from .memory import hbm


@pair("affine.pattern", good=8, bad=7)
def pattern(count):
    nisa.iota(sbuf((128, 8), nl.int32), [[1, count]])  # bad


@pair("affine.int32", good=2, bad=1.5)
def affine_numbers(step):
    nisa.iota(sbuf((128, 8), nl.int32), [[step, 8]])  # bad


@pair("affine_select.cmp_op", good=nl.greater, bad=nl.add)
def cmp_op(op):
    tile = nl.ones((128, 8), nl.float32)
    nisa.affine_select(sbuf((128, 8)), [[1, 8]], 1, tile, 0.0, cmp_op=op)  # bad


@pair("gather.operands", good=nl.uint32, bad=nl.int32)
def gather(dtype):
    data, index = nl.ones((128, 8), nl.float32), nl.zeros((128, 4), dtype)
    nisa.nc_n_gather(sbuf((128, 4)), data, index)  # bad


@pair("gather.index", good=7, bad=8)
def gather_index(value):
    data, index = nl.ones((128, 8), nl.float32), nl.full((128, 4), value, nl.uint32)
    nisa.nc_n_gather(sbuf((128, 4)), data, index)  # bad


@pair("tensor_partition_reduce.operands", good=nl.add, bad=nl.multiply)
def partition_reduce(op):
    nisa.tensor_partition_reduce(sbuf((1, 8)), op, nl.ones((128, 8), nl.float32))  # bad


@pair("nonzero_with_count.operands", good=9, bad=8)
def nonzero(columns):
    dst = sbuf((128, columns), nl.int32)
    nisa.nonzero_with_count(dst, nl.ones((128, 8), nl.float32))  # bad


@pair("nonzero_with_count.uninitialised", good=32, bad=16)
def nonzero_lanes(partitions):
    src = sbuf((32, 8))
    nisa.memset(src[0:partitions], 1.0)
    nisa.nonzero_with_count(sbuf((32, 9), nl.int32), src)  # bad


@pair("sequence_bounds.operands", good=1, bad=-1)
def sequence_bounds(value):
    ids = nl.full((1, 8), value, nl.int32)
    nisa.sequence_bounds(sbuf((1, 2, 8), nl.int32), ids)  # bad


@pair("instruction.integer_enum", good=nisa.dge_mode.swdge, bad=int(nisa.dge_mode.swdge.value))
def integer_enum(mode):
    nisa.dma_copy(sbuf((128, 8)), hbm((128, 8)), dge_mode=mode)  # bad


@pair("dma_copy.memory", good=nl.sbuf, bad=nl.psum)
def memory(region):
    nisa.dma_copy(nl.ndarray((128, 8), nl.float32, region), hbm((128, 8)))  # bad


@pair("dma_copy.elements", good=8, bad=7)
def elements(columns):
    nisa.dma_copy(sbuf((128, columns)), hbm((128, 8)))  # bad


@pair("dma_copy.mode", good=0, bad=0, generation="gen2", good_generation="gen3")
def mode(_):
    nisa.dma_copy(sbuf((128, 8)), hbm((128, 8)), dge_mode=nisa.dge_mode.hwdge)  # bad


@pair("dma_copy.dynamic", good=nisa.dge_mode.swdge, bad=nisa.dge_mode.none)
def dynamic(mode):
    index = nl.zeros((1, 1), nl.uint32)
    src = hbm((4, 128, 8)).ap([[8, 128], [1, 8]], scalar_offset=index, indirect_dim=0)
    nisa.dma_copy(sbuf((128, 8)), src, dge_mode=mode)  # bad


@pair("dynamic.offset", good=nl.uint32, bad=nl.float32)
def offset(dtype):
    index = nl.zeros((1, 1), dtype)
    hbm((4, 128, 8)).ap([[8, 128], [1, 8]], scalar_offset=index, indirect_dim=0)  # bad


@pair("dynamic.bounds", good=3, bad=4)
def bounds(value):
    index = nl.full((1, 1), value, nl.uint32)
    src = hbm((4, 128, 8)).ap([[8, 128], [1, 8]], scalar_offset=index, indirect_dim=0)
    nisa.dma_copy(sbuf((128, 8)), src)  # bad


@pair("dma_compute.operands", good=1.0, bad=2.0)
def compute(scale):
    one, two = hbm((128, 8)), hbm((128, 8))
    nisa.dma_compute(hbm((128, 8)), (one, two), nl.add, scales=(1.0, scale))  # bad


@pair("dma_compute.indirect", good=True, bad=False)
def compute_indirect(unique):
    index = nl.shared_constant(np.arange(128, dtype=np.uint32).reshape(128, 1))
    rows = nl.load(index)
    table, added = hbm((128, 8)), nl.ones((128, 8), nl.float32)
    dst = table.ap([[8, 128], [1, 8]], vector_offset=rows, indirect_dim=0)
    nisa.dma_compute(dst, (dst, added), nl.add, unique_indices=unique)  # bad


@pair("dma_transpose.operands", good=(1, 0), bad=(0, 1))
def transpose(axes):
    nisa.dma_transpose(sbuf((8, 128)), hbm((128, 8)), axes=axes)  # bad


@pair("dma_transpose.mode", good=nl.bfloat16, bad=nl.float32)
def transpose_mode(dtype):
    src, dst = hbm((16, 128), dtype), sbuf((128, 16), dtype)
    nisa.dma_transpose(dst, src, dge_mode=nisa.dge_mode.hwdge)  # bad


@pair("dma_transpose.no_dge", good=nisa.dge_mode.unknown, bad=nisa.dge_mode.none)
def transpose_without_dge(mode):
    src, dst = hbm((16, 128), nl.bfloat16), sbuf((128, 16), nl.bfloat16)
    nisa.dma_transpose(dst, src, dge_mode=mode)  # bad


@pair("dma_transpose.indirect", good=nl.bfloat16, bad=nl.float32)
def transpose_indirect(dtype):
    index = nl.zeros((16, 1), nl.uint32)
    src = hbm((64, 32), dtype).ap([[32, 16], [1, 32]], vector_offset=index, indirect_dim=0)
    nisa.dma_transpose(sbuf((32, 16), dtype), src)  # bad


@pair("register.operands", good=1, bad=None)
def register(value):
    source, target = nisa.register_alloc(value), nisa.register_alloc(0)
    nisa.register_move(target, source)  # bad


@pair("register.loop_variable", good=False, bad=True)
def loop_variable(write):
    other = nisa.register_alloc(0)

    def body(i):
        nisa.register_move(i if write else other, 1)  # bad

    nl.fori_loop(0, 2, body)


@pair("register.arithmetic", good=False, bad=True)
def arithmetic(add):
    register, more = nisa.register_alloc(1), 1 if add else ()
    (register, more) if more == () else register + more  # bad


@pair("register_store.gen2", good=0, bad=0, generation="gen2", good_generation="gen3")
def register_store(_):
    nisa.register_store(hbm((1, 1), nl.int32), nisa.register_alloc(1))  # bad


@pair("tensor_copy.run_time_address", good=0, bad=0, generation="gen2", good_generation="gen3")
def copy_address(_):
    index, tile = nl.zeros((1, 1), nl.uint32), nl.ones((128, 16), nl.float32)
    src = tile.ap([[16, 128], [1, 8]], scalar_offset=index, indirect_dim=1)
    nisa.tensor_copy(sbuf((128, 8)), src)  # bad


@pair("tensor_copy.scalar_engine", good=1 << 24, bad=(1 << 24) + 1)
def integers_on_scalar_engine(value):
    src = nl.full((128, 8), value, nl.int32)
    nisa.tensor_copy(sbuf((128, 8), nl.int32), src, nisa.engine.scalar)  # bad


@pair("instruction.arguments", good=True, bad=False)
def arguments(given):
    dst = psum((8, 128)) if given else None
    nisa.nc_transpose(dst, nl.ones((128, 8), nl.float32))  # bad
