"""dma_transpose, dma_compute, tensor_scalar_cumulative and exponential."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import FP32_ROUNDING, load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning

X, Y = normal(128, 48), normal(128, 48, seed=1)
BF16 = ml_dtypes.bfloat16


def _transpose(shape, **options):
    def kernel(x):
        out = sbuf(shape, x.dtype)
        nisa.dma_transpose(out, x, **options)  # bad
        return store(out)

    return kernel


def test_dma_transpose_swaps_the_first_and_last_dims():
    np.testing.assert_array_equal(run(_transpose((48, 128)), X), X.T)
    x = X.reshape(16, 4, 2, 48)
    expected = x.transpose(3, 1, 2, 0)
    np.testing.assert_array_equal(run(_transpose((48, 4, 2, 16), axes=(3, 1, 2, 0)), x), expected)
    x = x[:, :, 0]
    np.testing.assert_array_equal(run(_transpose((48, 4, 16)), x), x.transpose(2, 1, 0))


def test_dma_transpose_rules():
    def to_psum(x):
        nisa.dma_transpose(psum((48, 128)), x)  # bad

    hardware = {"dge_mode": nisa.dge_mode.hwdge}
    x = X[:16].astype(BF16)
    assert (run(_transpose((48, 16), **hardware), x) == x.T).all()
    rejects("dma_transpose.mode", _transpose((48, 16), **hardware), x, generation="gen2")
    rejects("dma_transpose.mode", _transpose((48, 16), **hardware), X[:16])
    rejects("dma_transpose.mode", _transpose((48, 128), **hardware), X.astype(BF16))
    rejects("dma_transpose.mode", _transpose((48, 128), dge_mode=nisa.dge_mode.swdge), X)
    rejects("dma_transpose.mode", _transpose((48, 128), priority=1), X)
    for none in (nisa.dge_mode.none, 3):
        with pytest.warns(NkiSimulatorWarning, match="dma_transpose.no_dge"):
            assert (run(_transpose((48, 128), dge_mode=none), X) == X.T).all()
    rejects("dma_transpose.operands", _transpose((48, 128), axes=(0, 1)), X)
    rejects("dma_transpose.operands", _transpose((128, 48)), X)
    rejects("dma_transpose.operands", to_psum, X)


def test_dma_compute_adds_in_fp32_and_rounds_once():
    def kernel(x, y):
        out = sbuf(x.shape, nl.bfloat16)
        nisa.dma_compute(out, [x, load(y), x], nl.add, scales=[1.0, 1.0, 1.0])
        return store(out)

    x, y = X.astype(BF16), Y.astype(BF16)
    wide = x.astype(np.float32)
    assert (run(kernel, x, y) == (wide + y.astype(np.float32) + wide).astype(BF16)).all()


@pytest.mark.parametrize(
    ("op", "scales", "count"), [(nl.multiply, None, 2), (nl.add, [1.0, 2.0], 2), (nl.add, None, 17)]
)
def test_dma_compute_rules(op, scales, count):
    def kernel(x):
        nisa.dma_compute(sbuf(x.shape), [x] * count, op, scales=scales)  # bad

    rejects("dma_compute.operands", kernel, X)


def _cumulative(op1=nl.add, first=nisa.reduce_cmd.reset_reduce, imm1=None):
    def kernel(x):
        out, tile = sbuf(x.shape, x.dtype), load(x)
        parts = out[:, 0:20], out[:, 20:48], tile[:, 0:20], tile[:, 20:48]
        nisa.tensor_scalar_cumulative(parts[0], parts[2], nl.multiply, op1, 2.0, imm1, first)  # bad
        more = nisa.reduce_cmd.reduce
        nisa.tensor_scalar_cumulative(parts[1], parts[3], nl.multiply, op1, 2.0, reduce_cmd=more)
        return store(out)

    return kernel


def test_cumulative_values_continue_across_instructions():
    np.testing.assert_array_equal(run(_cumulative(), X), np.add.accumulate(2 * X, axis=1))
    top = run(_cumulative(nl.max, nisa.reduce_cmd.load_reduce, 1.5), X)
    np.testing.assert_array_equal(top, np.maximum.accumulate(np.maximum(2 * X, 1.5), axis=1))
    state = np.zeros(128, np.float32)
    for i in range(48):
        state = 2 * X[:, i] - state
    np.testing.assert_array_equal(run(_cumulative(nl.subtract), X)[:, -1], state)


def test_cumulative_rules():
    rejects("tensor_scalar_cumulative.operands", _cumulative(nl.divide), X)
    rejects("tensor_scalar_cumulative.operands", _cumulative(imm1=1.0), X)
    rejects("tensor_scalar_cumulative.operands", _cumulative(), X.astype(np.int32))
    rejects("vector_reduce.accumulator", _cumulative(first=nisa.reduce_cmd.reduce), X)


def _exponential(x, top):
    out, total = sbuf(x.shape), sbuf((128, 1))
    tile, shift = load(x), load(top)
    command = nisa.reduce_cmd.reset_reduce
    nisa.exponential(out, tile, shift, total, command)  # bad
    return store(out), store(total)


def test_exponential_has_no_uint32_output():
    def kernel(x):
        nisa.exponential(sbuf(x.shape, nl.uint32), load(x))  # bad

    rejects("exponential.dtype", kernel, X, generation="gen4")


def test_exponential_subtracts_and_sums_on_gen4_only():
    top = X.max(axis=1, keepdims=True)
    out, total = run(_exponential, X, top, generation="gen4")
    np.testing.assert_array_equal(out, np.exp(X - top))
    exact = out.astype(np.float64).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(total, exact, rtol=48 * FP32_ROUNDING)
    rejects("instruction.generation", _exponential, X, top)
    rejects("operand.per_partition", _exponential, X, top.astype(BF16), generation="gen4")


def _gather_transpose(rows, columns=1, shape=None, **options):
    """Rows of x by index, transposed; the index is read column by column."""

    def kernel(x, index):
        tile = load(index)
        pattern = [[x.shape[1], rows], [1, x.shape[1]]]
        out = sbuf(shape or (x.shape[1], rows), x.dtype)
        nisa.memset(out, 0)
        gathered = x.ap(pattern, vector_offset=tile, indirect_dim=0)
        nisa.dma_transpose(out, gathered, axes=(1, 0), **options)  # bad
        return store(out)

    return kernel


SMALL = X.astype(BF16)


@pytest.mark.parametrize(
    ("partitions", "columns", "rows"), [(32, 1, 32), (128, 2, 256), (48, 1, 32)]
)
def test_gather_transpose_reads_its_index_column_by_column(partitions, columns, rows):
    index = np.random.default_rng(0).integers(0, 128, (partitions, columns)).astype(np.uint32)
    found = run(_gather_transpose(rows), SMALL, index)
    np.testing.assert_array_equal(found, SMALL[index.T.reshape(-1)[:rows]].T)


def test_a_skipped_row_leaves_its_part_of_the_destination():
    index = np.arange(32, dtype=np.uint32)[:, None]
    index[5] = 400
    with pytest.raises(ValueError, match=r"rule dynamic\.bounds"):
        run(_gather_transpose(32), SMALL, index)
    found = run(_gather_transpose(32, oob_mode=nisa.oob_mode.skip), SMALL, index)
    expected = SMALL[:32].T.copy()
    expected[:, 5] = 0
    np.testing.assert_array_equal(found, expected)


def test_gather_transpose_rules():
    index = np.arange(32, dtype=np.uint32)[:, None]
    name = "dma_transpose.indirect"
    rejects(name, _gather_transpose(32), X, index)
    rejects(name, _gather_transpose(24), SMALL, index)
    rejects(name, _gather_transpose(32), SMALL, index.astype(np.int32))
    rejects(name, _gather_transpose(32, dge_mode=nisa.dge_mode.hwdge), SMALL, index)
    rejects(name, _gather_transpose(32), SMALL, index, generation="gen2")


def _scatter_add(unique=True, **options):
    def kernel(out, x, index):
        view = out.ap([[48, 32], [1, 48]], vector_offset=load(index), indirect_dim=0)
        nisa.dma_compute(view, [view, load(x)], nl.add, unique_indices=unique, **options)  # bad
        return out

    return kernel


def test_rows_are_read_added_to_and_written_back():
    index = np.random.default_rng(0).permutation(128)[:32].astype(np.int32)[:, None]
    out = X.copy()
    run(_scatter_add(), out, X[:32], index)
    expected = X.copy()
    expected[index[:, 0]] += X[:32]
    np.testing.assert_array_equal(out, expected)

    def gather(x, index):
        tile = load(x[0:32])
        view = x.ap([[48, 32], [1, 48]], vector_offset=load(index), indirect_dim=0)
        nisa.dma_compute(tile, [view, tile], nl.add)
        return store(tile)

    np.testing.assert_array_equal(run(gather, X, index), X[:32] + X[index[:, 0]])


def test_rules_of_adding_to_rows():
    index = np.arange(32, dtype=np.int32)[:, None]
    twice = np.zeros_like(index)
    rejects("dma_compute.indirect", _scatter_add(), X.copy(), X[:32], twice)
    rejects("dma_compute.indirect", _scatter_add(unique=False), X.copy(), X[:32], index)
    rejects("dynamic.bounds", _scatter_add(), X.copy(), X[:32], index + 120)
    out = X.copy()
    run(_scatter_add(oob_mode=nisa.oob_mode.skip), out, X[:32], index + 120)
    np.testing.assert_array_equal(out[120:], X[120:] + X[:8])
    np.testing.assert_array_equal(out[:120], X[:120])

    def skip(x):
        nisa.dma_compute(sbuf(x.shape), [x, x], nl.add, oob_mode=nisa.oob_mode.skip)  # bad

    rejects("dma_compute.operands", skip, X)
