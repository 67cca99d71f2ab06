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
        mantissa, exponent = np.frexp(wide.astype(np.float64))
        kept = np.ldexp(np.rint(np.ldexp(mantissa, 11)), exponent - 11)
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
