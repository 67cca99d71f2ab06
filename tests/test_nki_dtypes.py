"""Conversions are those of ml_dtypes and of the documented rules, for every 8- and 16-bit value."""

import copy
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, run, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, dtypes

SMALL_FLOATS = [
    dtypes.float16,
    dtypes.bfloat16,
    dtypes.float8_e4m3,
    dtypes.float8_e4m3fn,
    dtypes.float8_e5m2,
]
EXPONENTS = dtypes.float8_e8m0fnu  # positive powers of two and NaN
INTEGERS = [dtypes.int8, dtypes.uint8, dtypes.int16, dtypes.uint16, dtypes.int32, dtypes.uint32]


def _all_values(dtype):
    carrier = np.uint8 if dtype.itemsize == 1 else np.uint16
    return np.arange(2 ** (8 * dtype.itemsize)).astype(carrier).view(dtype.np_dtype)


def _store(values, dtype):
    out = np.empty(values.shape, dtype.np_dtype)
    with np.errstate(all="ignore"):
        dtypes.store_f32(out, values.astype(np.float32), dtype)
    return out


def _same_bits(a, b):
    carrier = f"u{a.dtype.itemsize}"
    with np.errstate(invalid="ignore"):
        both_nan = np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64))
    return bool(((a.view(carrier) == b.view(carrier)) | both_nan).all())


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_every_small_float_survives_a_round_trip(dtype):
    values = _all_values(dtype)
    assert _same_bits(_store(dtypes.to_f32(values, dtype), dtype), values)


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_rounding_agrees_with_ml_dtypes_at_and_around_every_halfway_point(dtype):
    exact = _all_values(dtype).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    middle = (exact[:-1].astype(np.float64) + exact[1:]) / 2
    middle = middle.astype(np.float32)
    up, down = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = np.float32([np.inf, -np.inf, np.nan])
    values = np.concatenate([middle, up, down, random.view(np.float32), special])
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32).astype(dtype.np_dtype)
    assert _same_bits(_store(values, dtype), expected)


def _expected(values, source, target):
    """The documented conversion: to fp32, then to the target by ml_dtypes or, for integers, to the
    nearest even integer in range, NaN to 0."""
    wide = values.astype(np.float32)
    if target.kind == "f" and target is not dtypes.tfloat32:
        return wide.astype(target.np_dtype)
    if target is dtypes.tfloat32:
        exact = wide.astype(np.float64)
        step = np.maximum(np.frexp(exact)[1], -125) - 11  # of subnormals as of the least normal
        kept = np.ldexp(np.rint(np.ldexp(exact, -step)), step)
        return np.where(np.isfinite(wide), kept, wide).astype(np.float32)
    if target.kind == "b":
        return (wide != 0).astype(np.uint8)
    info = np.iinfo(target.np_dtype)
    whole = np.rint(wide.astype(np.float64))
    whole = np.where(np.isnan(whole), 0, np.clip(whole, info.min, info.max))
    return whole.astype(target.np_dtype)


SMALL = [*SMALL_FLOATS, EXPONENTS, *(d for d in INTEGERS if d.itemsize < 4)]


@pytest.mark.parametrize("target", [*dtypes.ALL], ids=str)
def test_every_8_and_16_bit_value_converts_to_every_type_as_documented(target):
    for source in SMALL:
        values = _all_values(source)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values beyond float8_e4m3 are the point here
            expected = _expected(values, source, target)
            got = np.empty(values.shape, target.np_dtype)
            dtypes.store_f32(got, dtypes.to_f32(values, source), target)
        assert _same_bits(got, expected), f"{source} to {target}"


def test_the_sources_of_the_exhaustive_test_are_all_the_small_types():
    small = {d for d in dtypes.ALL if d.itemsize < 4 and d is not dtypes.bool_}
    assert set(SMALL) == small
    assert all(len(_all_values(d)) == 2 ** (8 * d.itemsize) for d in SMALL)


@pytest.mark.parametrize("target", [*dtypes.ALL], ids=str)
def test_booleans_convert_to_every_type(target):
    values = np.array([0, 1], np.uint8)
    got = np.empty(2, target.np_dtype)
    dtypes.store_f32(got, dtypes.to_f32(values, dtypes.bool_), target)
    wide = np.array([0, 1], np.float32)
    with np.errstate(all="ignore"):
        assert _same_bits(got, wide.astype(target.np_dtype))


@pytest.mark.parametrize("source", [*SMALL_FLOATS, *INTEGERS], ids=str)
def test_instructions_convert_like_the_tables(source):
    targets = [d for d in (*SMALL_FLOATS, *INTEGERS, dtypes.float32) if d is not source]
    values = _all_values(source if source.itemsize < 4 else dtypes.int16)[::17]
    x = values.astype(source.np_dtype)[: 16 * (len(values) // 16)].reshape(16, -1)

    def kernel(x):
        found = []
        for target in targets:
            for move in (nisa.tensor_copy, nisa.dma_copy):
                tile = nl.ndarray(x.shape, target)
                move(tile, load(x))
                found.append(store(tile))
            tile = nl.ndarray(x.shape, target)
            nisa.activation(tile, nl.copy, load(x))
            found.append(store(tile))
        return tuple(found)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = run(kernel, x)
        for i, target in enumerate(targets):
            expected = _expected(x, source, target)
            for got in found[3 * i : 3 * i + 3]:
                assert _same_bits(got, expected), f"{source} to {target}"


def _hard_values():
    """float32 [32, n]: halfway points of every small type, the last numbers of every type and what
    lies around them, subnormals, zeros of both signs, infinities and NaN."""
    ends = [240, 448, 57344, 65504, 127, 255, 32767, 65535, 2.0**31, 2.0**32, 3.4e38]
    tiny = [2.0**k for k in (-6, -9, -10, -14, -16, -17, -24, -25, -126, -133, -134, -149)]
    halves = [k + 0.5 for k in range(4)] + [1 + 2.0**-k for k in (2, 3, 4, 8, 9, 11, 12)]
    base = np.array([0.0, *ends, *tiny, *halves, *(1.5 * x for x in tiny)], np.float32)
    below, above = np.nextafter(base, np.float32(0)), np.nextafter(base, np.float32(np.inf))
    both = np.concatenate([base, below, above])
    values = np.concatenate([both, -both, np.float32([np.inf, -np.inf, np.nan])])
    return np.resize(values, (32, -(-len(values) // 32)))


def _through_psum(dst, x):
    tile = nl.ndarray(x.shape, nl.float32, nl.psum)
    nisa.tensor_copy(tile, x)
    nisa.tensor_copy(dst, tile)


def _product(dst, x):
    """x once more, as the one term of a matrix product in PSUM: what is not finite is left out."""
    product = nl.ndarray(x.shape, nl.float32, nl.psum)
    nisa.nc_matmul(product, nl.shared_identity_matrix(32, nl.float32), x)
    nisa.tensor_copy(dst, product)


CASTS = {
    "tensor_copy": nisa.tensor_copy,
    "tensor_copy on ScalarE": lambda dst, x: nisa.tensor_copy(dst, x, nisa.engine.scalar),
    "tensor_copy on GpSimdE": lambda dst, x: nisa.tensor_copy(dst, x, nisa.engine.gpsimd),
    "PSUM to SBUF": _through_psum,
    "nc_matmul": _product,
    "activation": lambda dst, x: nisa.activation(dst, nl.copy, x),
    "tensor_scalar": lambda dst, x: nisa.tensor_scalar(dst, x, nl.multiply, 1.0),
    "tensor_tensor": lambda dst, x: nisa.tensor_tensor(dst, x, x, nl.maximum),
    "scalar_tensor_tensor": lambda dst, x: nisa.scalar_tensor_tensor(
        dst, x, nl.multiply, 1.0, nl.maximum, x
    ),
    "tensor_reduce": lambda dst, x: nisa.tensor_reduce(
        dst, nl.maximum, x.reshape((*x.shape, 1)), axis=2
    ),
    "affine_select": lambda dst, x: nisa.affine_select(
        dst, [[1, x.shape[1]]], 0, x, 0.0, nl.greater_equal
    ),
    "dma_copy": nisa.dma_copy,
}


@pytest.mark.parametrize("cast", CASTS)
def test_every_instruction_that_casts_rounds_alike(cast):
    x = _hard_values()
    if cast == "nc_matmul":  # a zero times infinity would reach its whole column
        x = np.where(np.isfinite(x), x, 1)

    def kernel(x):
        found = []
        for target in dtypes.ALL:
            tile = nl.ndarray(x.shape, target)
            CASTS[cast](tile, load(x))
            found.append(store(tile))
        return tuple(found)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # values beyond float8_e4m3 are the point here
        for target, got in zip(dtypes.ALL, run(kernel, x), strict=True):
            expected = _expected(x, dtypes.float32, target)
            got = got.view(np.uint8) if target.kind == "b" else got
            if cast == "nc_matmul":  # sums start at +0, so a zero has lost its sign
                got, expected = got + target.np_dtype.type(0), expected + target.np_dtype.type(0)
            assert _same_bits(got, expected), f"{cast} to {target}"


@pytest.mark.parametrize("target", dtypes.ALL, ids=str)
def test_constants_and_counts_round_like_copies(target):
    fractions = [0.5, 1.5, 2.5, 1 + 2.0**-4, 1 + 2.0**-9, 239.0, 2.0**-10, 2.0**-134]
    numbers = [0, 1, 17, 100] if target.kind in "iu" else fractions

    def constants():
        tile = nl.ndarray((1, len(numbers)), target)
        for i, number in enumerate(numbers):
            nisa.memset(tile[:, i : i + 1], number)
        return store(tile)

    def counts():
        tile = nl.ndarray((4, 64), target)
        nisa.iota(tile, [[37, 64]], offset=-300, channel_multiplier=1 << 29)
        return store(tile)

    whole = np.arange(4)[:, None] * (1 << 29) - 300 + 37 * np.arange(64)
    if target.kind in "iu":  # 32-bit integers that saturate, without a detour through float32
        info = np.iinfo(target.np_dtype)
        expected = np.clip(whole, info.min, info.max).astype(target.np_dtype)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if target.kind not in "iu":
            expected = _expected(whole.astype(np.float32), dtypes.float32, target)
        bits = f"u{target.itemsize}"
        filled = _expected(np.float32([numbers]), dtypes.float32, target)
        assert (run(constants).view(bits) == filled.view(bits)).all()
        assert (run(counts).view(bits) == expected.view(bits)).all()


WIDE = np.array([[2**24 + 1, 2**31 - 1, -(2**31), -(2**24) - 1, 3, 0, -1, 2**30 + 1]] * 32)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_integers_beyond_float32_keep_their_bits_where_nothing_is_cast(dtype):
    x = WIDE.astype(np.int32).view(dtype)

    def kernel(x):
        tile, predicate, found = load(x), nl.ones(x.shape, nl.uint8), []

        def result():
            found.append(nl.zeros(x.shape, x.dtype))
            return found[-1]

        nisa.tensor_copy(result(), tile)
        nisa.tensor_copy(result(), tile, nisa.engine.gpsimd)
        nisa.tensor_tensor(result(), tile, tile, nl.maximum)
        nisa.tensor_tensor(result(), tile, tile, nl.maximum, engine=nisa.engine.gpsimd)
        nisa.affine_select(result(), [[1, 8]], 0, tile, 0.0, nl.greater_equal)
        nisa.tensor_copy_predicated(result(), tile, predicate)
        nisa.nc_stream_shuffle(result(), tile, list(range(32)))
        nisa.dma_copy(result(), tile)
        return tuple(store(tile) for tile in found)

    for got in run(kernel, x):
        np.testing.assert_array_equal(got, x)


def test_a_mix_of_integers_and_floats_is_computed_in_float32_on_every_engine():
    whole, half = np.full((4, 4), 3, np.int32), np.full((4, 4), 0.5, np.float32)

    def kernel(whole, half):
        floats, bits = nl.ndarray((4, 4), nl.float32), nl.ndarray((4, 4), nl.int32)
        for engine in (nisa.engine.gpsimd, nisa.engine.vector):
            nisa.tensor_tensor(floats, load(whole), load(half), nl.multiply, engine=engine)
            nisa.tensor_tensor(bits, load(whole), load(half), nl.add, engine=engine)
            yield_(floats, bits)
        return tuple(stored)

    stored = []

    def yield_(*tiles):
        stored.extend(store(tile) for tile in tiles)

    for found, expected in zip(run(kernel, whole, half), [1.5, 4, 1.5, 4], strict=True):
        assert (found == expected).all()


def test_a_value_beyond_float8_e4m3_is_reported():
    def kernel(x):
        tile = nl.ndarray(x.shape, nl.float8_e4m3)
        nisa.tensor_copy(tile, load(x))
        return store(tile)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(kernel, np.full((2, 2), 247.9, np.float32))[0, 0] == 240
    with pytest.warns(NkiSimulatorWarning, match=r"rule float8\.range"):
        assert np.isinf(run(kernel, np.full((2, 2), 248, np.float32)).astype(np.float32)).all()


def test_truncation_instead_of_rounding_is_caught():
    values = np.float32([1.0 + 3 * 2.0**-9])
    truncated = (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(ml_dtypes.bfloat16)
    assert not _same_bits(_store(values, dtypes.bfloat16), truncated)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_round_to_even_and_saturate(dtype):
    info = np.iinfo(dtype.np_dtype)
    cases = {
        0.5: 0,
        1.5: 2,
        2.5: 2,
        1e20: info.max,
        -1e20: info.min,
        np.inf: info.max,
        -np.inf: info.min,
        np.nan: 0,
    }
    if dtype.kind == "i":
        cases |= {-0.5: 0, -1.5: -2}
    got = _store(np.array(list(cases)), dtype)
    assert got.tolist() == list(cases.values())


def test_tfloat32_keeps_ten_mantissa_bits():
    got = _store(np.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, np.inf]), dtypes.tfloat32)
    assert got.tolist() == [1 + 2.0**-10, 1.0, 1 + 2.0**-9, np.inf]


def test_a_dtype_is_its_name_and_64_bit_types_are_refused():
    assert dtypes.dtype_of("bfloat16") is dtypes.bfloat16
    assert dtypes.dtype_of(np.dtype(ml_dtypes.bfloat16)) is dtypes.bfloat16
    assert dtypes.float32 == "float32"
    with pytest.raises(ValueError, match="64-bit types do not exist"):
        dtypes.dtype_of(np.float64)


def test_copies_of_a_dtype_are_the_dtype():
    for dtype in dtypes.ALL:
        assert copy.deepcopy([dtype])[0] is dtype
        assert copy.copy(dtype) is dtype
        assert pickle.loads(pickle.dumps(dtype)) is dtype
