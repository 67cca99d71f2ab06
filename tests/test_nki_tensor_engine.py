"""nc_matmul and nc_transpose: values, accumulation rules, limits per generation."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import (
    FP32_ROUNDING,
    GENERATIONS,
    load,
    nisa,
    nl,
    normal,
    psum,
    rejects,
    run,
    sbuf,
    store,
)

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, SimParams, parameters

A, B = normal(256, 128), normal(256, 512, seed=1)
FP8 = [ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2]


def _close(got, a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    allowed = a.shape[0] * FP32_ROUNDING * (np.abs(a).T @ np.abs(b))
    assert (np.abs(got - a.T @ b) <= allowed).all()


def _accumulating(flags):
    """dst += A_i.T @ B_i over the two halves, with the given accumulate flags."""

    def kernel(a, b):
        dst = psum((128, 512))
        for i, flag in enumerate(flags):
            rows = slice(128 * i, 128 * i + 128)
            nisa.nc_matmul(dst, load(a[rows]), load(b[rows]), accumulate=flag)  # bad
        return store(dst)

    return kernel


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, *FP8])
def test_the_product_is_exact_up_to_fp32_rounding(dtype, generation):
    a, b = A[:128].astype(dtype), B[:128].astype(dtype)
    _close(run(_accumulating([False]), a, b, generation=generation), a, b)


@pytest.mark.parametrize("flags", [(False, True), (None, None), (False, None), (None, True)])
def test_the_first_matmul_overwrites_and_later_ones_add(flags):
    _close(run(_accumulating(flags), A, B), A, B)


def test_accumulate_false_forgets_what_was_there():
    _close(run(_accumulating([False, False]), A, B), A[128:], B[128:])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_adding_to_unwritten_psum_is_caught(generation):
    rejects("nc_matmul.accumulate_first", _accumulating([True]), A, B, generation=generation)


def _on_top_of(prepare, flag):
    def kernel(a, b):
        dst = psum((128, 512))
        prepare(dst, b)
        nisa.nc_matmul(dst, load(a[0:128]), load(b[0:128]), accumulate=flag)  # bad
        return store(dst)

    return kernel


def _copy(dst, b):
    nisa.tensor_copy(dst, load(b[128:256]))


@pytest.mark.parametrize("prepare", [_copy, lambda dst, b: nisa.memset(dst, 0)])
def test_adding_to_what_another_engine_wrote_needs_gen4(prepare):
    for generation in ("gen2", "gen3"):
        kernel = _on_top_of(prepare, True)
        rejects("nc_matmul.accumulate_foreign", kernel, A, B, generation=generation)
    got = run(_on_top_of(prepare, True), A, B, generation="gen4")
    start = B[128:] if prepare is _copy else 0
    np.testing.assert_allclose(got, A[:128].T @ B[:128] + start, atol=1e-3)


def test_rescaling_an_accumulator_in_place_and_adding_on_is_caught():
    def kernel(a, b):
        dst = psum((128, 512))
        nisa.nc_matmul(dst, load(a[0:128]), load(b[0:128]))
        nisa.tensor_scalar(dst, dst, nl.multiply, 0.5)
        nisa.nc_matmul(dst, load(a[128:256]), load(b[128:256]))  # bad

    rejects("nc_matmul.accumulate_foreign", kernel, A, B)


def test_inferred_accumulation_on_zeroed_psum_is_a_plain_sum():
    got = run(_on_top_of(lambda dst, b: nisa.memset(dst, 0), None), A, B)
    _close(got, A[:128], B[:128])


def test_parts_of_one_psum_tile_accumulate_on_their_own():
    def kernel(a, b):
        dst = psum((128, 512))
        for part in (0, 1):
            columns = slice(256 * part, 256 * part + 256)
            for i in (0, 1):
                rows = slice(128 * i, 128 * i + 128)
                nisa.nc_matmul(dst[:, columns], load(a[rows]), load(b[rows, columns]))
        return store(dst)

    _close(run(kernel, A, B), A, B)


def test_inferred_accumulation_over_half_written_memory_warns_and_adds_where_written():
    def kernel(a, b):
        dst = psum((128, 512))
        a_tile, b_tile = load(a[0:128]), load(b[0:128])
        nisa.nc_matmul(dst[:, 0:256], a_tile, b_tile[:, 0:256])
        nisa.nc_matmul(dst, a_tile, b_tile)
        return store(dst)

    with pytest.warns(NkiSimulatorWarning, match=r"nc_matmul\.accumulate_mixed"):
        got = run(kernel, A, B)
    _close(got[:, 256:], A[:128], B[:128, 256:])
    _close(got[:, :256] / 2, A[:128], B[:128, :256])


def _matmul(k, m, n, dtype=None, dst_dtype=None, dst_shape=None, **options):
    def kernel():
        a, b = nl.ones((k, m), dtype or nl.bfloat16), nl.ones((k, n), dtype or nl.bfloat16)
        dst = psum(dst_shape or (m, n), dst_dtype)
        nisa.nc_matmul(dst, a, b, **options)  # bad
        return store(dst)

    return kernel


def test_tile_limits():
    assert (run(_matmul(64, 128, 512)) == 64).all()
    rejects("nc_matmul.shape", _matmul(128, 129, 128, dst_shape=(128, 129)))
    rejects("nc_matmul.shape", _matmul(128, 128, 256, dst_shape=(128, 128)))
    for generation in ("gen2", "gen3"):
        rejects("nc_matmul.moving_free", _matmul(128, 128, 513), generation=generation)
    assert (run(_matmul(128, 128, 1024), generation="gen4") == 128).all()


def test_a_result_across_two_psum_banks_needs_gen4():
    def kernel():
        dst = psum((128, 1024))
        a, b = nl.ones((128, 128), nl.bfloat16), nl.ones((128, 512), nl.bfloat16)
        nisa.nc_matmul(dst[:, 256:768], a, b)  # bad
        return store(dst[:, 256:768])

    for generation in ("gen2", "gen3"):
        rejects("nc_matmul.bank", kernel, generation=generation)
    assert (run(kernel, generation="gen4") == 128).all()


def test_dtype_rules():
    rejects("nc_matmul.input_dtype", _matmul(128, 128, 128, dtype=nl.int32))
    rejects("nc_matmul.input_dtype", _matmul(128, 128, 128, dtype=nl.float8_e4m3fn))
    assert (run(_matmul(128, 128, 128, dtype=nl.float8_e4m3fn), generation="gen4") == 128).all()
    for generation in ("gen2", "gen3"):
        kernel = _matmul(128, 128, 128, dst_dtype=nl.bfloat16)
        rejects("nc_matmul.dst_dtype", kernel, generation=generation)
    assert (run(_matmul(128, 128, 128, dst_dtype=nl.bfloat16), generation="gen4") == 128).all()

    def mixed(a, b):
        nisa.nc_matmul(psum((128, 512)), load(a), load(b))  # bad

    rejects("nc_matmul.input_dtype", mixed, A[:128].astype(ml_dtypes.bfloat16), B[:128])


def test_memory_rules():
    def to_sbuf(a, b):
        nisa.nc_matmul(sbuf((128, 512)), load(a), load(b))  # bad

    def from_psum(a, b):
        moving = psum((128, 512))
        nisa.tensor_copy(moving, load(b))
        nisa.nc_matmul(psum((128, 512)), load(a), moving)  # bad

    rejects("nc_matmul.memory", to_sbuf, A[:128], B[:128])
    rejects("operand.tile", from_psum, A[:128], B[:128])


def test_row_tiling_and_double_rows():
    assert (run(_matmul(32, 128, 64, tile_position=(32, 0), tile_size=(32, 128))) == 32).all()
    kernel = _matmul(32, 128, 64, tile_position=(32, 0), tile_size=(32, 128))
    rejects("nc_matmul.tile", kernel, generation="gen2")
    kernel = _matmul(64, 128, 64, tile_position=(16, 0), tile_size=(64, 128))
    rejects("nc_matmul.tile", kernel)

    def double(generation_bad=False):
        a, b = nl.ones((128, 2, 64), nl.float8_e5m2), nl.ones((128, 2, 256), nl.float8_e5m2)
        dst = psum((64, 256))
        nisa.nc_matmul(dst, a, b, perf_mode=nisa.matmul_perf_mode.double_row)  # bad
        return store(dst)

    assert (run(double) == 256).all()
    rejects("nc_matmul.double_row", double, generation="gen2")


def _transposing(dst_buffer, **options):
    def kernel(x):
        tile = load(x)
        dst = nl.ndarray((x.shape[1], x.shape[0]), dtype=x.dtype, buffer=dst_buffer)
        nisa.nc_transpose(dst, tile, **options)  # bad
        return store(dst)

    return kernel


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_transposes(generation, dtype):
    x = normal(128, 96, dtype=dtype)
    assert (run(_transposing(nl.psum), x, generation=generation) == x.T).all()
    small = x[:32, :16]
    got = run(_transposing(nl.sbuf, engine=nisa.engine.vector), small, generation=generation)
    assert (got == small.T).all()


def test_a_transpose_spreads_nan_on_gen2_only():
    x = normal(128, 64)
    x[3, 5] = np.nan
    exact = run(_transposing(nl.psum), x, generation="gen3")
    assert np.isnan(exact).sum() == 1
    spread = run(_transposing(nl.psum), x, generation="gen2")
    assert np.isnan(spread[5]).all()
    assert np.isnan(spread).sum() == 128


def test_transpose_limits():
    rejects("nc_transpose.operands", _transposing(nl.sbuf), normal(128, 64))
    rejects(
        "nc_transpose.operands", _transposing(nl.sbuf, engine=nisa.engine.vector), normal(64, 32)
    )

    def other_dtype(x):
        nisa.nc_transpose(psum((64, 128)), load(x))  # bad

    rejects("nc_transpose.operands", other_dtype, normal(128, 64, dtype=ml_dtypes.bfloat16))


def test_two_tensors_at_one_address_each_begin_by_overwriting():
    def kernel(x):
        tile = load(x)
        banks = [
            nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.psum, address=(0, 0)) for _ in range(2)
        ]
        outs = []
        for bank in banks:
            nisa.nc_matmul(bank, tile, tile)
            nisa.nc_matmul(bank, tile, tile)
            outs.append(store(bank))
        return tuple(outs)

    x = np.round(normal(128, 64))
    for out in run(kernel, x):
        np.testing.assert_array_equal(out, 2 * (x.T @ x))


def _by_identity(x, identity):
    out = psum((64, 128), x.dtype)
    nisa.nc_matmul(out, load(x), load(identity), is_transpose=True)
    return store(out)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_transpose_mode_keeps_bits_from_gen3_and_spreads_nan_on_gen2(dtype):
    x = normal(128, 64).astype(dtype)
    x[3, 5], x[7, 9] = np.nan, np.inf
    identity = np.eye(128, dtype=dtype)
    found = run(_by_identity, x, identity, generation="gen3")
    np.testing.assert_array_equal(found.astype(np.float32), x.T.astype(np.float32))
    order = np.random.default_rng(0).permutation(128)
    found = run(_by_identity, x, np.ascontiguousarray(identity[:, order]), generation="gen3")
    np.testing.assert_array_equal(found.astype(np.float32), x.T[:, order].astype(np.float32))
    if dtype is np.float32:
        spread = run(_by_identity, x, identity, generation="gen2")
        assert np.isnan(spread[5]).all()
        assert np.isfinite(spread[6]).all()


def test_transpose_mode_with_another_moving_tile_is_a_product():
    x, other = np.round(normal(128, 64)), np.round(normal(128, 128, seed=1))
    found = run(_by_identity, x, other, generation="gen3")
    np.testing.assert_array_equal(found, x.T @ other)


@pytest.mark.parametrize("broken", [False, True])
def test_on_gen2_a_transpose_is_a_product_and_may_be_float32(broken):
    """Its NaN spreads along the row that it is multiplied into; public kernels for trn1 do so."""

    def kernel(x):
        out = psum((64, 128))
        nisa.nc_transpose(out, load(x))  # bad
        return store(out)

    x = normal(128, 64).astype(ml_dtypes.bfloat16)
    expected = x.T.astype(np.float32)
    if broken:
        x[5, 7], expected[7] = np.nan, np.nan
    with pytest.warns(NkiSimulatorWarning, match=r"rule nc_transpose\.product "):
        np.testing.assert_array_equal(run(kernel, x, generation="gen2"), expected)
    rejects("nc_transpose.operands", kernel, x)


def test_a_tolerated_matmul_beyond_a_bank_is_right():
    """Where a published kernel has one, its values decide."""

    def kernel(a, b):
        out = psum((128, 1024))
        nisa.nc_matmul(out, load(a), load(b))  # bad
        return store(out)

    a, b = np.round(normal(128, 128)), np.round(normal(128, 1024, seed=1))
    rejects("nc_matmul.moving_free", kernel, a, b)
    tolerant = SimParams(tolerate=("nc_matmul.moving_free", "nc_matmul.bank"))
    warned = pytest.warns(NkiSimulatorWarning, match=r"rule nc_matmul\.bank ")
    with parameters(tolerant), warned:
        np.testing.assert_array_equal(run(kernel, a, b), a.T @ b)


@pytest.mark.parametrize(("mode", "rows"), [("none", ()), ("double_row", (2,))])
def test_a_performance_mode_given_as_text_is_its_member(mode, rows):
    """As published kernels give it."""

    def kernel(a, b, given):
        out = psum((32, 16))
        nisa.nc_matmul(out, load(a), load(b), perf_mode=given)
        return store(out)

    a, b = (np.round(normal(64, *rows, n)).astype(ml_dtypes.float8_e4m3) for n in (32, 16))
    expected = run(kernel, a, b, nisa.matmul_perf_mode[mode])
    with pytest.warns(NkiSimulatorWarning, match=r"rule instruction\.integer_enum "):
        np.testing.assert_array_equal(run(kernel, a, b, mode), expected)
