"""NKI element types, and the two conversions engines do: load to fp32, round from fp32.

A `DType` is a str ("float32"), as in nki.language, that also knows its NumPy storage type.
Rounding is to nearest even; integers saturate (NKI 0.6 release notes); NaN becomes integer 0,
which no document fixes. 8-bit floats go through a 65,536-row table on the upper half of the fp32
pattern with a sticky bit (round to odd first, so the second rounding is exact).

Sources: nki.api.shared ("Supported Data Types"); ml_dtypes for the formats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .errors import broken
from .rules import inferred


class DType(str):
    """An element type: equal to its name, with `np_dtype`, `itemsize` (bytes) and `kind`."""

    np_dtype: np.dtype[Any]
    itemsize: int
    kind: str  # "f" float, "i" signed, "u" unsigned, "b" boolean, "p" packed

    def __new__(cls, name: str, np_type: Any, kind: str) -> DType:
        self = super().__new__(cls, name)
        self.np_dtype = np.dtype(np_type)
        self.itemsize = self.np_dtype.itemsize
        self.kind = kind
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are the one object of that name: types are compared by identity."""
        return dtype_of, (str(self),)


bool_ = DType("bool", np.uint8, "b")
int8 = DType("int8", np.int8, "i")
int16 = DType("int16", np.int16, "i")
int32 = DType("int32", np.int32, "i")
uint8 = DType("uint8", np.uint8, "u")
uint16 = DType("uint16", np.uint16, "u")
uint32 = DType("uint32", np.uint32, "u")
float16 = DType("float16", np.float16, "f")
float32 = DType("float32", np.float32, "f")
bfloat16 = DType("bfloat16", ml_dtypes.bfloat16, "f")
tfloat32 = DType("tfloat32", np.float32, "f")
float8_e4m3 = DType("float8_e4m3", ml_dtypes.float8_e4m3, "f")
float8_e4m3fn = DType("float8_e4m3fn", ml_dtypes.float8_e4m3fn, "f")
float8_e5m2 = DType("float8_e5m2", ml_dtypes.float8_e5m2, "f")
float8_e8m0fnu = DType("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, "f")

ALL = (
    bool_,
    int8,
    int16,
    int32,
    uint8,
    uint16,
    uint32,
    float16,
    float32,
    bfloat16,
    tfloat32,
    float8_e4m3,
    float8_e4m3fn,
    float8_e5m2,
    float8_e8m0fnu,
)
# Types that NKI_PRECISE_FP=0 stores as float32 (nki_simulator guide).
LOW_PRECISION = frozenset((bfloat16, float8_e4m3, float8_e4m3fn, float8_e5m2))
_F32 = np.dtype(np.float32)
FLOAT8 = frozenset((float8_e4m3, float8_e4m3fn, float8_e5m2))
# Four elements to a word, for the MX instructions: names to compare with, no tensors.
PACKED = tuple(
    DType(name, np.uint32, "p")
    for name in ("float8_e5m2_x4", "float8_e4m3fn_x4", "float4_e2m1fn_x4")
)
float8_e5m2_x4, float8_e4m3fn_x4, float4_e2m1fn_x4 = PACKED
_BY_NAME = {str(d): d for d in (*ALL, *PACKED)}
_BY_NUMPY = {d.np_dtype: d for d in ALL if d not in ("tfloat32", "bool")}
_BY_NUMPY[np.dtype(np.bool_)] = bool_


def dtype_of(value: Any) -> DType:
    """The DType of a DType, an NKI name, a NumPy dtype or a NumPy scalar type; else ValueError."""
    if type(value) is DType:
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    try:
        found = _BY_NUMPY.get(np.dtype(value))
    except TypeError:
        found = None
    if found is None:
        raise ValueError(
            f"expected an NKI dtype ({', '.join(_BY_NAME)}), got {value!r}; "
            "64-bit types do not exist on the device: cast on the host"
        )
    return found


def wide_scale(dtype: DType) -> int:
    """Stored bytes per byte of the type when low-precision types are stored as float32."""
    return 4 // dtype.itemsize if dtype in LOW_PRECISION else 1


def to_f32(array: Any, dtype: DType) -> Any:
    """`array` as float32: the same array for float32, a converted copy for every other type."""
    if dtype is float32 or dtype is tfloat32:
        return array
    if array.dtype == _F32:  # stored wide
        return array.copy()
    if dtype.itemsize == 1 and dtype.kind == "f":
        return _float8_values(dtype)[array.view(np.uint8)]
    return array.astype(np.float32)


@functools.cache
def _float8_values(dtype: DType) -> Any:
    return np.arange(256, dtype=np.uint8).view(dtype.np_dtype).astype(np.float32)


@functools.cache
def _float8_codes(dtype: DType) -> Any:
    upper = np.arange(65536, dtype=np.uint32) << 16
    return upper.view(np.float32).astype(dtype.np_dtype).view(np.uint8)


_E4M3_MAX = 240.0  # the largest float8_e4m3
_RANGE = inferred(
    "float8.range",
    "reports by users of trn1 and trn2; ml_dtypes",
    "values stored as float8_e4m3 are at most 240 in size: beyond, they become infinite",
)


def _store_float8(out: Any, values: Any, dtype: DType) -> None:
    if dtype is float8_e4m3:
        size = np.abs(values)
        largest = np.max(size, where=np.isfinite(size), initial=0.0)
        if largest >= _E4M3_MAX + 8:  # half a step more, which rounds up
            broken(_RANGE, "a store of float8_e4m3", f"the value {largest:g}")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    index = bits >> 16
    index |= (bits & 0xFFFF) != 0
    out.view(np.uint8)[...] = _float8_codes(dtype)[index]


def _store_plain(out: Any, values: Any, dtype: DType) -> None:
    out[...] = values


def _store_int(out: Any, values: Any, dtype: DType) -> None:
    info = np.iinfo(dtype.np_dtype)
    wide = np.rint(values, dtype=np.float64)
    np.clip(wide, info.min, info.max, out=wide)
    np.nan_to_num(wide, copy=False, nan=0.0)
    out[...] = wide.astype(dtype.np_dtype)


def _store_bool(out: Any, values: Any, dtype: DType) -> None:
    out[...] = values != 0


def _store_tf32(out: Any, values: Any, dtype: DType) -> None:
    bits = np.array(values, dtype=np.float32, copy=True).view(np.uint32)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (bits + (((bits >> 13) & 1) + 0xFFF)) & np.uint32(0xFFFFE000)
    out[...] = np.where(finite, rounded, bits).view(np.float32)


def _storer(dtype: DType) -> Callable[[Any, Any, DType], None]:
    if dtype is tfloat32:
        return _store_tf32
    if dtype.kind in "iu":
        return _store_int
    if dtype.kind == "b":
        return _store_bool
    if dtype.itemsize == 1:
        return _store_float8
    return _store_plain


_STORERS = {dtype: _storer(dtype) for dtype in ALL}


def store_f32(out: Any, values: Any, dtype: DType) -> None:
    """Write float32 `values` (same shape or broadcastable) into `out`, rounded to `dtype`."""
    if out.dtype == _F32 and dtype is not tfloat32:
        out[...] = values
    else:
        _STORERS[dtype](out, values, dtype)


def fill_unwritten(array: Any, dtype: DType) -> None:
    """Fill fresh memory: NaN for floats, 4 for integers (the vendor simulator's marks)."""
    if dtype.kind == "f":
        if dtype.itemsize == 1:
            array.view(np.uint8)[...] = 0xFF
        else:
            array[...] = np.nan
    else:
        array[...] = 4
