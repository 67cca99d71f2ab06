"""Cores and ranks: pairs of cores, races, collectives, schedules."""

import numpy as np
from nki_sim import nisa, nl, own_rows, sbuf

from nxd_cp.simulators.nki_api import Kernel, simulate_ranks
from nxd_cp.simulators.nki_api import collectives as ncc
from nxd_cp.simulators.nki_api.runtime import current

from . import alone, cores, on_ranks, pair

ALL = ncc.ReplicaGroup([[0, 1]])
SHAPE = (128, 8)


def shared(name="", shape=SHAPE, dtype=nl.float32, region=nl.shared_hbm):
    """Unwritten HBM that every core sees."""
    return nl.ndarray(shape, dtype, buffer=region, name=name)


def filled(name, shape=SHAPE, dtype=nl.float32):
    """The same, written with ones."""
    made = shared(name, shape, dtype)
    nisa.dma_copy(made, nl.ones(shape, dtype))
    return made


def _two(kernel, choice, generation):
    """On two cores, which not every generation has."""
    return Kernel(kernel, generation)[2](choice)  # bad


@pair("kernel.grid", good=0, bad=0, generation="gen2", good_generation="gen3", launch=_two)
def grid(_):
    nisa.memset(sbuf(SHAPE), 0.0)


@pair("kernel.same_outputs", good=0, bad=1, launch=cores)
def same_outputs(changed):  # bad
    out, tile = shared("out"), nl.ones((64, 8), nl.float32)
    nisa.dma_copy(out[own_rows(128)], tile)
    return (out, out) if nl.program_id(0) < changed else out


@pair("lnc.device_loops", good=0, bad=1, launch=cores)
def device_loops(extra):
    def body(i):
        nisa.memset(sbuf(SHAPE), 0.0)

    nl.fori_loop(0, 1 + extra * nl.program_id(0), body)  # bad


@pair("lnc.same_program", good=0, bad=1, launch=cores)
def same_program(extra):
    for _ in range(1 + extra * nl.program_id(0)):
        nisa.memset(sbuf(SHAPE), 0.0)
    nisa.iota(sbuf(SHAPE, nl.int32), [[1, 8]])  # bad


@pair("pair.alone", good=2, bad=1)
def barrier_alone(programs):
    if nl.num_programs(0) < programs:
        return
    nisa.core_barrier(filled("data"), (0,))  # bad


@pair("pair.cores", good=1, bad=2, launch=cores)
def send_to(peer):
    tile = nl.ones(SHAPE, nl.float32)
    other = 1 - nl.program_id(0)
    to = other if peer == 1 else peer
    nisa.sendrecv(tile, sbuf(SHAPE), to, to, 0)  # bad


@pair("sendrecv.tiles", good=nl.float32, bad=nl.bfloat16, launch=cores)
def send_tiles(dtype):
    other = 1 - nl.program_id(0)
    nisa.sendrecv(nl.ones(SHAPE, nl.float32), sbuf(SHAPE, dtype), other, other, 0)  # bad


@pair("sendrecv.gpsimd_dma", good=256, bad=257, launch=cores)
def send_gpsimd(columns):
    tile, other = nl.ones((128, columns), nl.float32), 1 - nl.program_id(0)
    engine = nisa.dma_engine.gpsimd_dma
    nisa.sendrecv(tile, sbuf((128, columns)), other, other, 0, dma_engine=engine)  # bad


@pair("core_barrier.data", good=nl.shared_hbm, bad=nl.private_hbm, launch=cores)
def barrier_data(region):
    nisa.core_barrier(shared("data", region=region), (0, 1))  # bad


def _halves():
    """Two tensors, each core's rows of the first written, and the other core's rows."""
    data, elsewhere = shared("data"), shared("elsewhere")
    other = nl.ds(64 * (1 - nl.program_id(0)), 64)
    nisa.dma_copy(data[own_rows(128)], nl.ones((64, 8), nl.float32))
    return data, elsewhere, other


@pair("race.shared_hbm", good=True, bad=False, launch=cores)
def race(barrier):
    data, _, other = _halves()
    nisa.core_barrier(data, (0, 1))
    nisa.dma_copy(data[own_rows(128)], nl.zeros((64, 8), nl.float32))  # bad
    if barrier:
        nisa.core_barrier(data, (0, 1))
    nisa.dma_copy(sbuf((64, 8)), data[other])


@pair("race.other_meeting", good=True, bad=False, launch=cores)
def other_meeting(right):
    data, elsewhere, other = _halves()
    nisa.core_barrier(data if right else elsewhere, (0, 1))
    nisa.dma_copy(sbuf((64, 8)), data[other])  # bad


@pair("race.both_write", good=False, bad=True, launch=cores)
def both_write(both):
    data, tile = shared("data"), sbuf(SHAPE)
    nisa.memset(tile, 1.0 + nl.program_id(0))
    rows = slice(0, 128) if both else own_rows(128)
    part = slice(0, 128) if both else slice(0, 64)
    nisa.dma_copy(data[rows], tile[part])  # bad


@pair("race.same_bytes", good=False, bad=True, launch=cores)
def same_bytes(both):
    data, tile = shared("data"), nl.ones(SHAPE, nl.float32)
    rows = slice(0, 128) if both else own_rows(128)
    part = slice(0, 128) if both else slice(0, 64)
    nisa.dma_copy(data[rows], tile[part])  # bad


@pair("race.collective", good=True, bad=False, launch=on_ranks(2, lnc=2))
def collective_race(barrier):
    src, dst = shared("src"), shared("dst")
    nisa.dma_copy(src[own_rows(128)], nl.ones((64, 8), nl.float32))
    if barrier:
        nisa.core_barrier(src, (0, 1))
    ncc.all_reduce([src], [dst], ALL, nl.add)  # bad


@pair("race.in_flight", good=True, bad=False, launch=on_ranks(2))
def in_flight(waits):
    src = nl.ndarray(SHAPE, nl.float32, nl.sbuf, address=(0, 0))
    dst = nl.ndarray(SHAPE, nl.float32, nl.sbuf, address=(0, 32))
    nisa.memset(src, 1.0)
    ncc.all_reduce([src], [dst], ALL, nl.add)
    if waits:
        nisa.tensor_copy(sbuf(SHAPE), dst)
    again = nl.ndarray(SHAPE, nl.float32, nl.sbuf, address=(0, 0))
    nisa.memset(again, 2.0)  # bad


@pair("ranks.agreement", good=0, bad=1, launch=on_ranks(2))
def agreement(odd):
    src, dst = filled("src"), shared("dst")
    op = nl.maximum if _rank() * odd else nl.add
    ncc.all_reduce([src], [dst], ALL, op)  # bad


def _rank():
    """The rank that runs: a kernel cannot know it, a test can."""
    return current("here").place.rank


@pair("collective.operands", good=True, bad=False, launch=on_ranks(2))
def operands(lists):
    src, dst = filled("src"), shared("dst")
    ncc.all_reduce([src] if lists else src, [dst], ALL, nl.add)  # bad


@pair("collective.name", good="src", bad="", launch=on_ranks(2))
def name(given):
    src, dst = filled(given), shared("dst")
    ncc.all_reduce([src], [dst], ALL, nl.add)  # bad


@pair("collective.alias", good=False, bad=True, launch=on_ranks(2))
def alias(in_place):
    src, dst = filled("src"), shared("dst")
    ncc.all_reduce([src], [src if in_place else dst], ALL, nl.add)  # bad


@pair("collective.sizes", good=8, bad=4, launch=on_ranks(2))
def sizes(columns):
    src, dst = filled("src"), shared("dst", (128, columns))
    ncc.all_reduce([src], [dst], ALL, nl.add)  # bad


@pair("collective.op", good=nl.minimum, bad=nl.multiply, launch=on_ranks(2))
def op(function):
    src, dst = filled("src"), shared("dst")
    ncc.all_reduce([src], [dst], ALL, function)  # bad


@pair("collective.dim", good=0, bad=1, launch=on_ranks(2))
def dim(along):
    src, dst = filled("src"), shared("dst", (256, 8) if along == 0 else (128, 16))
    ncc.all_gather([src], [dst], ALL, along)  # bad


@pair("collective.group", good=1, bad=2, launch=on_ranks(2))
def group(last):
    src, dst = filled("src"), shared("dst")
    ncc.all_reduce([src], [dst], ncc.ReplicaGroup([[0, last]]), nl.add)  # bad


@pair("collective.priority", good=3, bad=3, good_generation="gen4", launch=on_ranks(2))
def priority(level):
    src, dst = filled("src"), shared("dst")
    ncc.all_reduce([src], [dst], ALL, nl.add, priority=level)  # bad


@pair("collective.pairs", good=((0, 1), (1, 0)), bad=((0, 1),), launch=on_ranks(2))
def pairs(given):
    src, dst = filled("src"), shared("dst")
    ncc.collective_permute([src], [dst], given)  # bad


@pair("collective.channels", good=0, bad=1, launch=on_ranks(2))
def channels(channel):
    src, dst = filled("src"), shared("dst")
    ncc.collective_permute_implicit([[src]], [[dst]], ALL, channel_ids=(channel,))  # bad


@pair("collective.iteration", good=0, bad=-1, launch=on_ranks(2))
def iteration(number):
    ncc.collective_permute_implicit_current_processing_rank_id(number, ALL)  # bad


def _input(kernel, choice, generation):
    """Two ranks with an array of their own each."""
    arrays = [np.ones(SHAPE, np.float32) for _ in range(2)]
    return simulate_ranks(kernel, [(choice, x) for x in arrays], generation=generation)


@pair("collective.io_tensor", good=True, bad=False, launch=_input)
def io_tensor(copies, x):
    src, dst = shared("src"), shared("dst")
    nisa.dma_copy(src, x)
    ncc.all_reduce([src if copies else x], [dst], ALL, nl.add)  # bad


@pair("kernel.collective_output", good=True, bad=False, launch=on_ranks(2))
def collective_output(copies):
    src = filled("src")
    dst = nl.ndarray(SHAPE, nl.float32, buffer=nl.shared_hbm, name="dst")  # bad
    ncc.all_reduce([src], [dst], ALL, nl.add)
    if not copies:
        return dst
    out = shared("out")
    nisa.dma_copy(out, dst)
    return out


@pair("collective_v.metadata", good=nl.uint32, bad=nl.int32, launch=on_ranks(2))
def metadata(dtype):
    src, dst = filled("src", (1, 4)), shared("dst", (1, 4))
    table = nl.zeros((1, 3, 2), dtype)
    ncc.all_to_all_v([src], [dst], ALL, table)  # bad


@pair("collective_v.limits", good=False, bad=True, launch=on_ranks(2))
def limits(displacements):
    src, dst = filled("src", (1, 4)), shared("dst", (1, 4))
    table = nl.zeros((1, 4 if displacements else 3, 2), nl.uint32)
    ncc.all_to_all_v([src], [dst], ALL, table, has_rdispls=displacements)  # bad


def _scheduled(kernel, choice, generation):
    """With an edge to the instruction that is named."""
    return Kernel(kernel, generation).with_schedule([("copy", choice)])()  # bad


@pair("kernel.schedule", good="fill", bad="unknown", launch=_scheduled)
def schedule():
    tile = sbuf(SHAPE)
    nisa.memset(tile, 0.0, name="fill")
    nisa.tensor_copy(sbuf(SHAPE), tile, name="copy")


def _inner():  # bad
    nisa.memset(sbuf(SHAPE), 0.0)


@pair("front_end.nested_kernel", good=_inner, bad=Kernel(_inner), launch=alone)
def nested(inner):
    inner()
