"""A stand-in for `neuron_dtypes`, the vendor's package of NumPy element types and casts.

Written from how nki-library's tests use it: static_cast, sizeinbytes, finfo, is_float_type and a
few names. Packed MX types have names only; casting to one raises.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nxd_cp.simulators.nki_api.dtypes import DType, dtype_of, store_f32

bfloat16 = ml_dtypes.bfloat16
float8_e4m3 = ml_dtypes.float8_e4m3
float8_e4m3fn = ml_dtypes.float8_e4m3fn
float8_e5m2 = ml_dtypes.float8_e5m2
float8_e5m2_x4 = "float8_e5m2_x4"
float8_e4m3fn_x4 = "float8_e4m3fn_x4"
float4_e2m1fn_x4 = "float4_e2m1fn_x4"
_PACKED = (float8_e5m2_x4, float8_e4m3fn_x4, float4_e2m1fn_x4)


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    if isinstance(dtype, str) and str(dtype) in _PACKED:
        raise NotImplementedError(
            f"expected a plain dtype, got {dtype}; MX types are not simulated"
        )
    return dtype.np_dtype if isinstance(dtype, DType) else np.dtype(dtype)


def static_cast(array: Any, dtype: Any) -> Any:
    """`array` in another element type, rounded to nearest even (tfloat32 keeps 10 bits)."""
    values = np.asarray(array)
    if isinstance(dtype, str) and dtype == "tfloat32":
        out = np.empty(values.shape, np.float32)
        store_f32(out, values.astype(np.float32), dtype_of("tfloat32"))
        return out
    return values.astype(_numpy_type(dtype))


def sizeinbytes(dtype: Any) -> int:
    """Bytes of one element."""
    return _numpy_type(dtype).itemsize


def finfo(dtype: Any) -> Any:
    """Limits of a floating-point type."""
    return ml_dtypes.finfo(_numpy_type(dtype))


def is_float_type(dtype: Any) -> bool:
    """Whether an element type is a floating-point one."""
    plain = _numpy_type(dtype)
    return plain.kind == "f" or plain.name.startswith(("bfloat", "float"))
