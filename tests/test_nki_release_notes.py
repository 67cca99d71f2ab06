"""The simulator bugs that the NKI release notes of 0.4.0, 0.5.0 and 0.6.0 list as fixed.

One test each, in the order of the notes; packed (MX) types are left out. What a note says is
quoted in short where a test's name does not say it.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from nki_sim import load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning

X = normal(128, 64)
ONES32 = 2**32 - 1
FP32_MIN = float(np.finfo(np.float32).min)


# 0.6.0


def test_floats_become_integers_to_even_and_saturated():
    def kernel(x):
        tile = sbuf(x.shape, nl.int8)
        nisa.tensor_copy(tile, load(x))
        return store(tile)

    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 300, -300]], np.float32)
    assert run(kernel, x).tolist() == [[0, 2, 2, 0, -2, 127, -128]]


def _eight(values):
    return np.array([values], np.float32)


def test_match_replace8_takes_values_in_reverse():
    def kernel(data, vals):
        out, index = sbuf(data.shape), sbuf((1, 8), nl.uint32)
        nisa.nc_match_replace8(out, load(data), load(vals), 0.0, index)
        return store(out), store(index)

    data = _eight([5, 1, 5, 2, 3, 4, 6, 7, 8, 9])
    out, index = run(kernel, data, _eight([5, 5, 1, 2, 3, 4, 6, 7]))
    assert index[0].tolist() == [2, 0, 1, 3, 4, 5, 6, 7]  # the second 5 finds the first place
    assert out[0].tolist() == [0] * 8 + [8, 9]


def test_find_index8_gives_all_ones_for_what_is_absent_and_advances_on_duplicates():
    def kernel(data, vals):
        index = sbuf((1, 8), nl.uint32)
        nisa.nc_find_index8(index, load(data), load(vals))
        return store(index)

    data = _eight([5, 1, 5, 2, 3, 4, 6, 5])
    found = run(kernel, data, _eight([5, 5, 5, 5, 1, 99, 2, 3]))
    assert found[0].tolist() == [0, 2, 7, ONES32, 1, ONES32, 3, 4]


def test_a_reduction_result_inside_dst_is_not_clobbered():
    def kernel(x):
        out = sbuf((128, 64))
        nisa.activation_reduce(out, nl.copy, load(x), nl.add, out[:, 0:1])
        return store(out)

    x = np.round(8 * X)
    found = run(kernel, x)
    np.testing.assert_array_equal(found[:, 0], x.sum(axis=1))
    np.testing.assert_array_equal(found[:, 1:], x[:, 1:])


def test_double_row_contracts_both_rows_into_a_result_of_normal_size():
    def kernel(a, b):
        out = psum((32, 16))
        mode = nisa.matmul_perf_mode.double_row
        nisa.nc_matmul(out, load(a), load(b), perf_mode=mode)
        return store(out)

    a, b = (np.round(normal(64, 2, n, seed=n)).astype(ml_dtypes.float8_e4m3) for n in (32, 16))
    exact = np.einsum("krm,krn->mn", a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_array_equal(run(kernel, a, b), exact)


def test_overlapping_psum_regions_accumulate():
    """The convolution pattern: neighbouring outputs share columns."""

    def kernel(a, b):
        out, weights, image = psum((32, 48)), load(a), load(b)
        nisa.nc_matmul(out[:, 0:32], weights, image[:, 0:32])
        nisa.nc_matmul(out[:, 16:48], weights, image[:, 0:32])
        return store(out)

    a, b = np.round(normal(64, 32)), np.round(normal(64, 32, seed=1))
    expected = np.zeros((32, 48), np.float32)
    expected[:, :32] += a.T @ b
    expected[:, 16:] += a.T @ b
    with pytest.warns(NkiSimulatorWarning, match=r"rule nc_matmul\.accumulate_mixed"):
        np.testing.assert_array_equal(run(kernel, a, b), expected)


@pytest.mark.parametrize("generation", ["gen2", "gen3"])
def test_accumulation_patterns_that_are_wrong_on_hardware_are_reported(generation):
    def kernel(x):
        out = psum((64, 64))
        nisa.tensor_copy(out, load(x)[0:64])
        nisa.nc_matmul(out, load(x), load(x), accumulate=True)  # bad

    rejects("nc_matmul.accumulate_foreign", kernel, X, generation=generation)


def test_predicated_copies_take_operands_of_different_ranks():
    def kernel(x, mask):
        out = sbuf((128, 4, 4, 4))
        nisa.memset(out, 0.0)
        chosen = load(mask).reshape((128, 8, 8))
        nisa.tensor_copy_predicated(out, load(x), chosen)
        reduced = sbuf((128, 16, 4))
        nisa.select_reduce(reduced, chosen, load(x), 0.0)
        return store(out), store(reduced)

    mask = (X > 0).astype(np.uint8)
    copied, reduced = run(kernel, X, mask)
    expected = np.where(X > 0, X, 0)
    np.testing.assert_array_equal(copied.reshape(128, 64), expected)
    np.testing.assert_array_equal(reduced.reshape(128, 64), expected)


def test_a_python_float_is_a_fill_value():
    def kernel(x):
        tile, low, high = load(x), sbuf((128, 1)), sbuf((128, 1))
        nisa.memset(low, 8.0)
        nisa.memset(high, 16.0)
        ranged, affine = sbuf((128, 64)), sbuf((128, 64))
        nisa.range_select(
            ranged, tile, nl.greater_equal, nl.less, low, high, on_false_value=FP32_MIN
        )
        nisa.affine_select(affine, [[1, 64]], 0, tile, FP32_MIN, nl.equal)
        return store(ranged), store(affine)

    ranged, affine = run(kernel, X)
    columns = np.arange(64)
    inside = (columns >= 8) & (columns < 16)
    np.testing.assert_array_equal(ranged, np.where(inside, X, np.float32(FP32_MIN)))
    np.testing.assert_array_equal(affine, np.where(columns == 0, X, np.float32(FP32_MIN)))


def test_more_than_128_partitions_is_a_clear_error():
    def kernel():
        nl.ndarray((129, 4), dtype=nl.float32)  # bad

    rejects("memory.partitions", kernel)


def test_a_reduction_chain_reads_out_at_its_end_only():
    def kernel(x):
        tile, out, total = load(x), sbuf((128, 32)), sbuf((128, 1))
        nisa.tensor_scalar_reduce(out, tile[:, 0:32], nl.multiply, 1.0, nl.add)
        proceed = nisa.reduce_cmd.reduce
        nisa.tensor_scalar_reduce(
            out, tile[:, 32:64], nl.multiply, 1.0, nl.add, total, reduce_cmd=proceed
        )
        return store(total)

    x = np.round(8 * X)
    np.testing.assert_array_equal(run(kernel, x)[:, 0], x.sum(axis=1))


# 0.5.0


def test_a_skipped_copy_keeps_integer_bits_and_the_rest_of_dst():
    """0.5.0: out-of-bounds with oob_mode.skip; 0.4.0: integers no longer pass through float32."""

    def kernel(x, rows):
        out = sbuf((4, 8), nl.int32)
        nisa.memset(out, -7)
        view = x.ap([[8, 4], [1, 8]], vector_offset=load(rows), indirect_dim=0)
        nisa.dma_copy(out, view, oob_mode=nisa.oob_mode.skip)
        return store(out)

    x = np.arange(16 * 8, dtype=np.int32).reshape(16, 8) + 2**24 + 1  # not exact in float32
    found = run(kernel, x, np.array([[3], [99], [0], [15]], np.int32))
    np.testing.assert_array_equal(found[[0, 2, 3]], x[[3, 0, 15]])
    assert (found[1] == -7).all()


def test_matmul_operands_of_more_dims_keep_all_elements():
    """0.4.0 and 0.5.0: higher dims were dropped."""

    def kernel(a, b):
        out = psum((32, 4, 6))
        nisa.nc_matmul(out, load(a), load(b))
        return store(out)

    a, b = np.round(normal(64, 4, 8)), np.round(normal(64, 2, 3, 4, seed=1))
    expected = a.reshape(64, 32).T @ b.reshape(64, 24)
    np.testing.assert_array_equal(run(kernel, a, b).reshape(32, 24), expected)


def test_while_loops_end():
    def kernel(x):
        tile, count, one = load(x), sbuf((1, 1), nl.int32), sbuf((1, 1), nl.int32)
        nisa.memset(count, 3)
        nisa.memset(one, 1)
        register = nisa.register_alloc()
        nisa.register_load(register, count)

        def body(r):
            nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
            nisa.tensor_tensor(count, count, one, nl.subtract)
            nisa.register_load(r, count)
            return r

        nl.while_loop(register, body)
        return store(tile)

    np.testing.assert_array_equal(run(kernel, X), 8 * X)


def test_a_gather_transpose_leaves_what_it_skips():
    def kernel(x, rows):
        out = sbuf((64, 16), nl.bfloat16)
        nisa.memset(out, 3.0)
        view = x.ap([[64, 16], [1, 64]], vector_offset=load(rows), indirect_dim=0)
        nisa.dma_transpose(out, view, oob_mode=nisa.oob_mode.skip)
        return store(out)

    rows = np.arange(16, dtype=np.uint32)[:, None]
    rows[4] = 1000
    x = X.astype(ml_dtypes.bfloat16)
    found = run(kernel, x, rows)
    assert (found[:, 4] == 3).all()
    np.testing.assert_array_equal(np.delete(found, 4, 1), np.delete(x[:16].T, 4, 1))


def test_accumulating_onto_fresh_psum_is_reported():
    def kernel(x):
        nisa.nc_matmul(psum((64, 64)), load(x), load(x), accumulate=True)  # bad

    rejects("nc_matmul.accumulate_first", kernel, X)


def test_a_reshape_keeps_the_number_of_elements():
    def kernel(x):
        load(x).reshape((128, 63))  # bad

    rejects("view.shape", kernel, X)


# 0.4.0


def test_a_shuffle_mask_of_255_keeps_the_destination():
    def kernel(x):
        out = sbuf((32, 64))
        nisa.memset(out, 5.0)
        nisa.nc_stream_shuffle(out, load(x[0:32]), [1, 255] * 16)
        return store(out)

    found = run(kernel, X)
    assert (found[1::2] == 5).all()
    np.testing.assert_array_equal(found[0::2], np.broadcast_to(X[1], (16, 64)))


def test_local_gather_reads_and_writes_views():
    def kernel(x, index):
        out, source = sbuf((16, 12)), load(x[0:16])
        nisa.memset(out, 0.0)
        view = source.ap([[64, 16], [2, 32]])  # every second column
        nisa.local_gather(out[:, 4:8], view, load(index), 1, 4)
        return store(out)

    index = np.zeros((16, 1), np.uint16)
    index[:4, 0] = [3, 0, 31, 7]
    found = run(kernel, X, index)
    np.testing.assert_array_equal(found[:, 4:8], X[:16, ::2][:, [3, 0, 31, 7]])
    assert not found[:, :4].any()
    assert not found[:, 8:].any()


def test_registers_are_offsets_of_iota_and_affine_select():
    def kernel(x):
        numbers, chosen = sbuf((128, 8), nl.int32), sbuf((128, 64))
        at = nisa.register_alloc(5)
        nisa.iota(numbers, [[1, 8]], offset=at)
        nisa.affine_select(chosen, [[-1, 64]], 0, load(x), 0.0, nl.equal, offset=at)
        return store(numbers), store(chosen)

    numbers, chosen = run(kernel, X)
    np.testing.assert_array_equal(numbers, np.broadcast_to(np.arange(5, 13), (128, 8)))
    np.testing.assert_array_equal(chosen, np.where(np.arange(64) == 5, X, 0))


def test_dma_compute_has_no_scales_but_one():
    def kernel(x):
        nisa.dma_compute(sbuf(x.shape), [x, x], nl.add, scales=[1.0, 0.5])  # bad

    rejects("dma_compute.operands", kernel, X)


def test_logical_and_is_right():
    def kernel(x, y):
        return store(nl.logical_and(load(x), load(y)))

    x, y = np.array([[0, 0, 1, 2]], np.float32), np.array([[0, 3, 0, 4]], np.float32)
    assert run(kernel, x, y).tolist() == [[0, 0, 0, 1]]


@dataclass(frozen=True)
class Frozen(nl.NKIObject):
    scale: float = 2.0


def test_frozen_dataclasses_can_be_made():
    assert Frozen(3.0).scale == 3.0
    assert Frozen().scale == 2.0
    with pytest.raises(AttributeError):
        Frozen().scale = 1.0


def test_none_is_an_argument():
    def kernel(x, bias):
        return store(load(x)) if bias == None else None  # noqa: E711  the documented spelling

    np.testing.assert_array_equal(run(kernel, X, None), X)


@pytest.mark.parametrize("as_torch", [False, True])
def test_bool_stays_bool(as_torch):
    def kernel(x):
        out = sbuf(x.shape, nl.bool_)
        nisa.tensor_scalar(out, load(x), nl.greater, 0.0)
        return store(out)

    found = run(kernel, torch.from_numpy(X) if as_torch else X)
    assert found.dtype == (torch.bool if as_torch else np.bool_)
    np.testing.assert_array_equal(np.asarray(found), X > 0)


def test_a_loop_variable_is_a_register_that_cannot_be_written():
    def good(x):
        out = nl.ndarray((3, 64), nl.float32, nl.shared_hbm)
        for i in nl.dynamic_range(3):
            row = x.ap([[64, 1], [1, 64]], scalar_offset=i, indirect_dim=0)
            nisa.dma_copy(out.ap([[64, 1], [1, 64]], scalar_offset=i, indirect_dim=0), row)
        return out

    def bad(x):
        for i in nl.dynamic_range(3):
            nisa.register_move(i, 3)  # bad

    np.testing.assert_array_equal(run(good, X), X[:3])
    rejects("register.loop_variable", bad, X)


def test_nc_transpose_runs_on_the_engine_that_it_is_told():
    def kernel(x):
        nisa.nc_transpose(psum((64, 128)), load(x), engine=nisa.engine.vector)  # bad

    rejects("nc_transpose.operands", kernel, X)


def test_device_print_takes_tensors_of_any_rank(capsys):
    run(lambda x: nl.device_print("flat", x.reshape((128 * 64,))), X)
    assert capsys.readouterr().out.startswith("flat [")


def test_a_dma_transpose_checks_the_rank_of_dst():
    def kernel(x):
        tensor = x.reshape((64, 1, 1, 128))
        nisa.dma_transpose(sbuf((128, 64)), tensor)  # bad

    rejects("dma_transpose.operands", kernel, X)
