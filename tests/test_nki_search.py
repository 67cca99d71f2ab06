"""Scans, batch statistics, searches, shuffles and gathers."""

import numpy as np
import pytest
from nki_sim import FP32_ROUNDING, load, nisa, nl, normal, psum, rejects, run, sbuf, store

X, Y = normal(128, 48), normal(128, 48, seed=1)
SENTINEL = 2**32 - 1


def _scan(op0, op1, **options):
    def kernel(x, y, initial):
        out = sbuf(x.shape)
        first = load(initial)
        nisa.tensor_tensor_scan(out, load(x), load(y), first, op0, op1, **options)  # bad
        return store(out)

    return kernel


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_follows_the_recurrence(reverse):
    state, expected = X[:, :1], np.empty_like(X)
    for i in range(48):
        inner = X[:, i : i + 1] * state
        state = Y[:, i : i + 1] - inner if reverse else inner - Y[:, i : i + 1]
        expected[:, i : i + 1] = state
    kernel = _scan(nl.multiply, nl.subtract, reverse1=reverse)
    np.testing.assert_array_equal(run(kernel, X, Y, X[:, :1]), expected)


def test_scan_rules():
    def both_in_psum(x):
        a, b = psum(x.shape), psum(x.shape)
        nisa.tensor_copy(a, load(x))
        nisa.tensor_copy(b, load(x))
        nisa.tensor_tensor_scan(sbuf(x.shape), a, b, 0.0, nl.add, nl.add)  # bad

    rejects("scan.operands", both_in_psum, X)
    rejects("scan.operands", _scan(nl.bitwise_or, nl.add), X, Y, X[:, :1])
    rejects("operand.per_partition", _scan(nl.add, nl.add), X, Y, X[:, :2])


def test_batch_statistics_aggregate_to_mean_and_variance():
    def kernel(x):
        stats, out = sbuf((128, 12)), sbuf((128, 2))
        tile = load(x)
        nisa.bn_stats(stats[:, 0:6], tile[:, 0:33])
        nisa.bn_stats(stats[:, 6:12], tile[:, 33:48])
        nisa.bn_aggr(out, stats)
        return store(stats), store(out)

    stats, out = run(kernel, X)
    wide = X.astype(np.float64)
    np.testing.assert_array_equal(stats[:, [0, 3, 6, 9]], [[17, 16, 8, 7]] * 128)
    bound = 48 * FP32_ROUNDING * np.square(wide).max()
    np.testing.assert_allclose(out[:, 0], wide.mean(axis=1), atol=bound)
    np.testing.assert_allclose(out[:, 1], wide.var(axis=1), atol=bound)


def test_batch_statistics_rules():
    def too_long(x):
        tile = sbuf((128, 513))
        nisa.memset(tile, 0)
        nisa.bn_stats(sbuf((128, 6)), tile)  # bad

    def no_triples(x):
        nisa.bn_aggr(sbuf((128, 2)), load(x[:, 0:4]))  # bad

    rejects("bn_stats.shape", too_long, X)
    rejects("bn_stats.shape", no_triples, X)


def test_max8_then_find_index8():
    def kernel(x):
        top, at, tile = sbuf((128, 8)), sbuf((128, 8), nl.uint32), load(x)
        nisa.max8(top, tile)
        nisa.nc_find_index8(at, tile, top)
        return store(top), store(at)

    top, at = run(kernel, X)
    order = np.argsort(-X, axis=1)[:, :8]
    np.testing.assert_array_equal(top, np.take_along_axis(X, order, axis=1))
    np.testing.assert_array_equal(at, order)


def _row(*values):
    return np.tile(np.array(values, np.float32), (128, 1))


def test_find_index8_advances_over_duplicates_and_marks_absent_values():
    def kernel(x, vals):
        at = sbuf((128, 8), nl.uint32)
        nisa.nc_find_index8(at, load(x), load(vals))
        return store(at)

    at = run(kernel, _row(5, 1, 5, 2, 9, 9, 9, 5), _row(5, 5, 5, 5, 9, 1, 0, 2))
    np.testing.assert_array_equal(at, [[0, 2, 7, SENTINEL, 4, 1, SENTINEL, 3]] * 128)


def test_match_replace8_pairs_duplicates_in_descending_slots():
    def kernel(x, vals):
        out, at = sbuf((128, 11)), sbuf((128, 8), nl.uint32)
        nisa.nc_match_replace8(out, load(x), load(vals), -1.0, at)
        return store(out), store(at)

    out, at = run(kernel, _row(1, 2, 3, 4, *[8] * 7), _row(3, *[8] * 7))
    np.testing.assert_array_equal(at, [[2, 10, 9, 8, 7, 6, 5, 4]] * 128)
    np.testing.assert_array_equal(out, _row(1, 2, -1, 4, *[-1] * 7))


def test_search_shapes_are_checked():
    def short(x):
        nisa.max8(sbuf((128, 8)), load(x[:, 0:7]))  # bad

    def signed(x):
        tile = load(x)
        nisa.nc_find_index8(sbuf((128, 8), nl.int32), tile, tile[:, 0:8])  # bad

    def four_dims(x):
        nisa.max8(sbuf((128, 8)), load(x[:, 0:16]).reshape((128, 2, 2, 4)))  # bad

    def found_in_four_dims(x):
        tile = load(x[:, 0:16])
        view = tile.reshape((128, 2, 2, 4))
        nisa.nc_find_index8(sbuf((128, 8), nl.uint32), view, tile[:, 0:8])  # bad

    def folded(x):
        nisa.max8(sbuf((128, 2, 4)), load(x))  # bad

    for kernel in (short, signed, four_dims, found_in_four_dims, folded):
        rejects("search.shape", kernel, X)


def _nonzero(x):
    out = sbuf((128, 9), nl.int32)
    nisa.memset(out, 7)
    nisa.nonzero_with_count(out, load(x), index_offset=16)  # bad
    return store(out)


def test_nonzero_with_count_works_on_every_sixteenth_partition():
    x = np.tile(np.array([0, 1, 1, 0, 0, 1, 0, 0], np.int32), (128, 1))
    out = run(_nonzero, x)
    np.testing.assert_array_equal(out[::16], [[17, 18, 21, -1, -1, -1, -1, -1, 3]] * 8)
    assert (np.delete(out, np.s_[::16], axis=0) == 7).all()
    rejects("nonzero_with_count.operands", _nonzero, x.astype(np.int16))
    rejects("instruction.generation", _nonzero, x, generation="gen2")


def _shuffle(mask, rows=slice(0, 128), to=slice(0, 128)):
    def kernel(x):
        out, tile = sbuf((128, 48)), load(x)
        nisa.memset(out, 0)
        nisa.nc_stream_shuffle(out[to], tile[rows], mask)  # bad
        return store(out)

    return kernel


def test_stream_shuffle_permutes_each_quadrant_and_keeps_255():
    mask = [3, 255, *range(31, 1, -1)]
    expected = X.reshape(4, 32, 48)[:, np.where(np.array(mask) == 255, 0, mask)]
    expected[:, 1] = 0
    np.testing.assert_array_equal(run(_shuffle(mask), X), expected.reshape(128, 48))


def test_stream_shuffle_broadcasts_one_partition():
    out = run(_shuffle([0] * 32, slice(64, 65), slice(32, 64)), X)
    np.testing.assert_array_equal(out[32:64], np.broadcast_to(X[64], (32, 48)))
    assert (out[64:] == 0).all()


def test_stream_shuffle_rules():
    wide = _shuffle([0] * 32, slice(0, 33), slice(64, 97))
    assert run(wide, X).shape == (128, 48)
    rejects("nc_stream_shuffle.operands", _shuffle([32] * 32), X)
    rejects("nc_stream_shuffle.operands", _shuffle([1] * 32, slice(0, 1), slice(0, 32)), X)
    rejects("operand.partition_start", _shuffle([0] * 32, slice(0, 33), slice(32, 65)), X)
    rejects("nc_stream_shuffle.partition_start", _shuffle([0] * 32, slice(0, 33), slice(32, 64)), X)


def _gather(x, index):
    out, tile, where = sbuf(index.shape, x.dtype), load(x), load(index)
    nisa.nc_n_gather(out, tile, where)  # bad
    return store(out)


def test_n_gather_takes_by_partition():
    index = (np.arange(128 * 20) * 7 % 48).reshape(128, 20).astype(np.uint32)
    np.testing.assert_array_equal(run(_gather, X, index), np.take_along_axis(X, index, axis=1))
    rejects("gather.index", _gather, X, index + np.uint32(1))
    rejects("gather.operands", _gather, X, index.astype(np.int32))


def _local(width=2, valid=None):
    def kernel(x, index):
        count = valid or 16 * index.shape[1]
        out, tile, where = sbuf((128, count, width)), load(x), load(index)
        nisa.local_gather(out, tile, where, width, valid)  # bad
        return store(out)

    return kernel


@pytest.mark.parametrize("valid", [None, 37])
def test_local_gather_shares_indices_among_sixteen_partitions(valid):
    index = (np.arange(128 * 3) * 5 % 47).reshape(128, 3).astype(np.uint16)
    out = run(_local(valid=valid), X, index)
    for core in range(8):
        rows = slice(16 * core, 16 * core + 16)
        flat = index[rows].flatten(order="F")[:valid]
        np.testing.assert_array_equal(out[rows, :, 0], X[rows][:, flat])
        np.testing.assert_array_equal(out[rows, :, 1], X[rows][:, flat + 1])


def test_local_gather_rules():
    index = np.zeros((128, 3), np.uint16)
    rejects("gather.operands", _local(width=3), X, index)
    rejects("gather.operands", _local(), X, index.astype(np.uint32))
    rejects("gather.index", _local(), X, index + np.uint16(47))


def test_partition_reduce():
    def kernel(x, op):
        out, tile = sbuf((1, *x.shape[1:]), x.dtype), load(x)
        nisa.tensor_partition_reduce(out, op, tile)  # bad
        return store(out)

    np.testing.assert_array_equal(run(kernel, X, nl.max), X.max(axis=0, keepdims=True))
    bits = np.arange(128 * 4, dtype=np.int32).reshape(128, 4)
    expected = np.bitwise_or.reduce(bits, axis=0, keepdims=True)
    np.testing.assert_array_equal(run(kernel, bits, nl.bitwise_or), expected)
    rejects("tensor_partition_reduce.operands", kernel, X, nl.multiply)
    rejects("tensor_partition_reduce.operands", kernel, X, nl.bitwise_or)


def test_average_over_partitions():
    def kernel(x):
        tile = sbuf((1, x.shape[1]))
        nisa.tensor_partition_reduce(tile, nl.average, load(x))
        return store(tile)

    x = np.arange(32 * 8, dtype=np.float32).reshape(32, 8)  # exact in fp32
    np.testing.assert_array_equal(run(kernel, x), x.mean(axis=0, keepdims=True))

    def along_free_dims(x):
        nisa.tensor_reduce(sbuf((32, 1)), nl.average, load(x), axis=1)  # bad

    rejects("operand.op", along_free_dims, x)
