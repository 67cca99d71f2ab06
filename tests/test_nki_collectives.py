"""nki.collectives against NumPy, on one and two cores per rank, in HBM and in SBUF."""

import functools

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, own_rows, sbuf, store

from nxd_cp.simulators.nki_api import (
    NkiSimulatorWarning,
    SimParams,
    parameters,
    record,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api import collectives as ncc

# In some kernels both cores of a rank write the same bytes; test_nki_races.py has the rules.
RACES = "ignore:(?s).*rule race:nxd_cp.simulators.nki_api.NkiSimulatorWarning"
pytestmark = pytest.mark.filterwarnings(RACES)
N = 4
ONE_GROUP = [[0, 1, 2, 3]]
GROUPS = [ONE_GROUP, [[0, 2], [3, 1]], [[2], [0, 1, 3]]]
OPS = {"add": np.add, "minimum": np.minimum, "maximum": np.maximum}
INPUTS = [normal(12, 8, seed=r) for r in range(N)]
FLOAT8 = ml_dtypes.float8_e5m2


def hbm(shape, dtype, name):
    return nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm, name=name)


def through(x, shape, collective, on_chip=False):
    """A copy of x through `collective(src, dst)` with a dst of `shape`."""
    if on_chip:
        src, dst = load(x), sbuf(shape, x.dtype)
        collective(src, dst)
        return store(dst)
    src, dst, out = (hbm(s, x.dtype, n) for s, n in ((x.shape, "s"), (shape, "d"), (shape, "")))
    copy(src, x)
    collective(src, dst)
    copy(out, dst)
    return out


def copy(dst, src):
    """Each core copies its rows, and then both go on."""
    rows = own_rows(src.shape[0])
    nisa.dma_copy(dst[rows], src[rows])
    if nl.num_programs() == 2:
        nisa.core_barrier(dst, (0, 1))


def on_ranks(kernel, inputs=INPUTS, lnc=1, generation="gen3"):
    return simulate_ranks(kernel, [(x,) for x in inputs], lnc=lnc, generation=generation)


def members(groups, rank):
    return next(g for g in groups if rank in g)


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("on_chip", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("groups", GROUPS)
def test_all_reduce(groups, op, on_chip, lnc):
    group = ncc.ReplicaGroup(groups)

    def kernel(x):
        def reduce(src, dst):
            ncc.all_reduce([src], [dst], group, getattr(nl, op))

        return through(x, x.shape, reduce, on_chip)

    for rank, got in enumerate(on_ranks(kernel, lnc=lnc)):
        parts = [INPUTS[r] for r in members(groups, rank)]
        np.testing.assert_array_equal(got, functools.reduce(OPS[op], parts))


def test_all_reduce_sums_in_fp32_and_rounds_once():
    inputs = [np.full((1, 4), v, ml_dtypes.bfloat16) for v in (256.0, 1.0, 1.0, 1.0)]
    group = ncc.ReplicaGroup(ONE_GROUP)

    def kernel(x):
        return through(x, x.shape, lambda s, d: ncc.all_reduce([s], [d], group, nl.add))

    (got, *_) = on_ranks(kernel, inputs)
    assert got[0, 0] == ml_dtypes.bfloat16(259.0)  # one by one in bf16 it would stay 256


@pytest.mark.parametrize("dtype", [np.float32, np.int32, ml_dtypes.bfloat16, FLOAT8])
@pytest.mark.parametrize(("dim", "on_chip"), [(0, False), (0, True), (1, True)])
def test_all_gather(dim, on_chip, dtype):
    inputs = [(10 * x).astype(dtype) for x in INPUTS]
    group = ncc.ReplicaGroup([[3, 1], [0, 2]])

    def kernel(x):
        shape = tuple(2 * s if d == dim else s for d, s in enumerate(x.shape))
        return through(x, shape, lambda s, d: ncc.all_gather([s], [d], group, dim), on_chip)

    for rank, got in enumerate(on_ranks(kernel, inputs)):
        parts = [inputs[r] for r in members([[3, 1], [0, 2]], rank)]
        np.testing.assert_array_equal(got, np.concatenate(parts, dim))


@pytest.mark.parametrize("on_chip", [False, True])
def test_reduce_scatter(on_chip):
    group = ncc.ReplicaGroup(ONE_GROUP)

    def kernel(x):
        def scatter(src, dst):
            ncc.reduce_scatter([src], [dst], group, 0, nl.add)

        return through(x, (3, 8), scatter, on_chip)

    total = functools.reduce(np.add, INPUTS)
    for rank, got in enumerate(on_ranks(kernel)):
        np.testing.assert_array_equal(got, total[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize("lnc", [1, 2])
def test_all_to_all(lnc):
    group = ncc.ReplicaGroup(ONE_GROUP)

    def kernel(x):
        return through(x, x.shape, lambda s, d: ncc.all_to_all([s], [d], group, 0))

    for rank, got in enumerate(on_ranks(kernel, lnc=lnc)):
        parts = [x[3 * rank : 3 * rank + 3] for x in INPUTS]
        np.testing.assert_array_equal(got, np.concatenate(parts))


def test_several_tensors_in_one_call():
    group = ncc.ReplicaGroup(ONE_GROUP)

    def kernel(x):
        tensors = [hbm(x.shape, x.dtype, n) for n in "abcd"]
        nisa.dma_copy(tensors[0], x)
        nisa.dma_copy(tensors[1], x)
        ncc.all_reduce(tensors[:2], tensors[2:], group, nl.maximum)
        out = hbm(x.shape, x.dtype, "")
        nisa.dma_copy(out, tensors[3])
        return out

    np.testing.assert_array_equal(on_ranks(kernel)[1], functools.reduce(np.maximum, INPUTS))


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (2, 3), (3, 0)], [(0, 2), (2, 0)]])
def test_collective_permute(pairs):
    def kernel(x):
        def permute(src, dst):
            nisa.dma_copy(dst, src)  # ranks outside the pairs keep it
            ncc.collective_permute([src], [dst], pairs)

        return through(x, x.shape, permute)

    comes_from = {target: source for source, target in pairs}
    for rank, got in enumerate(on_ranks(kernel)):
        np.testing.assert_array_equal(got, INPUTS[comes_from.get(rank, rank)])


def ring_gather(x, group, num_ranks, channels=1, on_chip=False):
    """All-gather by a ring, the rows of the result chosen by the rank register."""
    rows, width = x.shape
    part = width // channels
    if on_chip:
        buffers = [sbuf((rows, width), x.dtype) for _ in range(2)]
    else:
        buffers = [hbm((rows, width), x.dtype, f"ring{i}") for i in range(2)]
    out = hbm((num_ranks, rows, width), x.dtype, "out")
    nisa.dma_copy(buffers[0], x)
    for step in range(num_ranks):
        here, there = buffers[step % 2], buffers[1 - step % 2]
        for channel in range(channels):
            columns = nl.ds(channel * part, part)
            rank = ncc.collective_permute_implicit_current_processing_rank_id(step, group, channel)
            place = out.ap(
                [[width, rows], [1, part]],
                offset=channel * part,
                scalar_offset=rank,
                indirect_dim=0,
            )
            nisa.dma_copy(place, here[:, columns])
        if step < num_ranks - 1:
            cut = [nl.ds(channel * part, part) for channel in range(channels)]
            ncc.collective_permute_implicit(
                [[here[:, c]] for c in cut],
                [[there[:, c]] for c in cut],
                group,
                channel_ids=list(range(channels)),
            )
    return out


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("on_chip", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_implicit_ring_brings_every_ranks_data(channels, on_chip, lnc):
    group = ncc.ReplicaGroup(ONE_GROUP)
    outputs = on_ranks(lambda x: ring_gather(x, group, N, channels, on_chip), lnc=lnc)
    for got in outputs:
        np.testing.assert_array_equal(got, np.stack(INPUTS))


def test_the_ring_register_counts_within_the_group():
    groups = [[1, 3], [0, 2]]
    outputs = on_ranks(lambda x: ring_gather(x, ncc.ReplicaGroup(groups), 2))
    for rank, got in enumerate(outputs):
        np.testing.assert_array_equal(got, np.stack([INPUTS[r] for r in members(groups, rank)]))


def test_collective_permute_implicit_reduce():
    group = ncc.ReplicaGroup(ONE_GROUP)

    def kernel(x):
        def reduce(src, dst):
            ncc.collective_permute_implicit_reduce([[src]], [[src]], [[dst]], group, nl.add)

        return through(x, x.shape, reduce)

    for rank, got in enumerate(on_ranks(kernel)):
        np.testing.assert_array_equal(got, 2 * INPUTS[(rank - 1) % N])


def test_rank_id_selects_a_row():
    table = np.arange(N, dtype=np.int32).reshape(1, N)

    def kernel(x):
        out, index = hbm((1, 1), x.dtype, ""), sbuf((1, 1), x.dtype)
        nisa.dma_copy(index, x.ap([[1, 1], [1, 1]], scalar_offset=ncc.rank_id(), indirect_dim=1))
        nisa.dma_copy(out, index)
        return out

    assert [int(o[0, 0]) for o in on_ranks(kernel, [table] * N)] == [0, 1, 2, 3]


def test_register_arithmetic_works_with_a_warning():
    table = np.arange(2 * N, dtype=np.int32).reshape(1, 2 * N)

    def kernel(x):
        out, index = hbm((1, 1), x.dtype, ""), sbuf((1, 1), x.dtype)
        at = 1 + (ncc.rank_id() * 2 - 2) % 8
        nisa.dma_copy(index, x.ap([[1, 1], [1, 1]], scalar_offset=at, indirect_dim=1))
        nisa.dma_copy(out, index)
        return out

    with pytest.warns(NkiSimulatorWarning, match=r"rule register\.arithmetic "):
        assert [int(o[0, 0]) for o in on_ranks(kernel, [table] * N)] == [7, 1, 3, 5]


COUNTS = np.array([[1, 2, 3, 0], [0, 1, 4, 2], [2, 2, 0, 1], [3, 0, 1, 4]], np.uint32)


def variable_table(counts, extra_rows=1):
    """send_counts, send_displs and rows that the call fills."""
    displs = np.cumsum(counts, dtype=np.uint32) - counts
    empty = np.zeros((extra_rows, len(counts)), np.uint32)
    return np.concatenate([counts[None], displs[None].astype(np.uint32), empty])


def variable(x, meta, call, slot, on_chip=False):
    """x through a variable collective; returns dst and the metadata afterwards."""
    src, dst = hbm(x.shape, x.dtype, "s"), hbm((N * slot,), x.dtype, "d")
    out = hbm((N * slot,), x.dtype, "")
    rows = hbm(meta.shape, meta.dtype, "")
    nisa.dma_copy(src, x)
    table = sbuf((1, *meta.shape), meta.dtype) if on_chip else hbm(meta.shape, meta.dtype, "m")
    nisa.dma_copy(table, meta)
    fill = sbuf((1, N * slot), x.dtype)
    nisa.memset(fill, -1.0)
    nisa.dma_copy(dst, fill)
    call(src, dst, table)
    nisa.dma_copy(out, dst)
    nisa.dma_copy(rows, table)
    return out, rows


@pytest.mark.parametrize("on_chip", [False, True])
def test_all_to_all_v(on_chip):
    slot, group = 5, ncc.ReplicaGroup(ONE_GROUP)
    inputs = [(normal(16, seed=r), variable_table(COUNTS[r])) for r in range(N)]

    def kernel(x, meta):
        def call(src, dst, table):
            ncc.all_to_all_v([src], [dst], group, table)

        return variable(x, meta, call, slot, on_chip)

    outputs = simulate_ranks(kernel, inputs, lnc=2, generation="gen4")
    for rank, (got, rows) in enumerate(outputs):
        for s in range(N):
            count, at = COUNTS[s, rank], inputs[s][1][1, rank]
            piece = got[s * slot : (s + 1) * slot]
            np.testing.assert_array_equal(piece[:count], inputs[s][0][at : at + count])
            assert (piece[count:] == -1).all()
        np.testing.assert_array_equal(rows[2], COUNTS[:, rank])


def test_all_gather_v_sends_everyone_the_same_chunk():
    slot, group = 4, ncc.ReplicaGroup(ONE_GROUP)
    inputs = [(normal(16, seed=r), variable_table(COUNTS[r])) for r in range(N)]

    def kernel(x, meta):
        def call(src, dst, table):
            ncc.all_gather_v([src], [dst], group, table, recv_counts_known=True)

        return variable(x, meta, call, slot)

    outputs = simulate_ranks(kernel, inputs, lnc=2, generation="gen3")
    for got, rows in outputs:
        for s in range(N):
            count = COUNTS[s, 0]
            np.testing.assert_array_equal(got[s * slot :][:count], inputs[s][0][:count])
        assert (rows[2] == 0).all()


def test_the_log_says_who_sends_to_whom_on_which_channel():
    group = ncc.ReplicaGroup(ONE_GROUP)
    with record() as log:
        on_ranks(lambda x: ring_gather(x, group, N, channels=2), lnc=2)
    mine = log.cores[1, 1]
    assert [e.kind for e in mine.exchanges] == ["collective_permute_implicit"] * (N - 1)
    exchange = mine.exchanges[0]
    assert exchange.sends_to == ((2, 1), (2, 1))
    assert exchange.receives_from == ((0, 1), (0, 1))
    assert exchange.channels == (0, 1)
    assert exchange.bytes_sent == INPUTS[0].nbytes
    assert len(exchange.sources) == len(exchange.destinations) == 2
    assert mine[exchange.seq].opcode == "collective_permute_implicit"
    assert (mine[exchange.seq].engine, mine[exchange.seq].detail) == ("cc", "4")
    meetings = [[e.meeting for e in log.cores[place].exchanges] for place in log.cores]
    assert all(numbers == meetings[0] for numbers in meetings)


def test_shape_only_mode_logs_the_same():
    group = ncc.ReplicaGroup(ONE_GROUP)

    def logged(values):
        with parameters(SimParams(values=values)), record() as log:
            on_ranks(lambda x: ring_gather(x, group, N), lnc=2)
        return log

    full, shapes = logged(True), logged(False)
    for place, log in full.cores.items():
        assert log.exchanges == shapes.cores[place].exchanges
        assert list(log) == list(shapes.cores[place])
