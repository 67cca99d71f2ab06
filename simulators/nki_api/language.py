"""nki.language: dtypes, memory regions, allocation, ranges, program ids and operator names.

Operators are values to pass as `op=`. Ranges are plain Python ranges, as documented. Code that
needs a builtin that an operator shadows (abs, max, min) lives in other files.

Source: nki.language.
"""

from __future__ import annotations

import inspect

from .allocation import (
    empty_like,
    full,
    is_hbm,
    is_on_chip,
    is_psum,
    is_sbuf,
    ndarray,
    ones,
    shared_constant,
    shared_identity_matrix,
    zeros,
    zeros_like,
)
from .arguments import guarded
from .dtypes import (
    DType,
    bfloat16,
    bool_,
    float4_e2m1fn_x4,
    float8_e4m3,
    float8_e4m3fn,
    float8_e4m3fn_x4,
    float8_e5m2,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    float32,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from .errors import fail
from .functions.elementwise import ceil, cos, floor, logical_not, negative, tan, trunc, where
from .functions.movement import (
    broadcast_to,
    device_print,
    expand_dims,
    gather_flattened,
    load,
    load_transpose2d,
    matmul,
    store,
    transpose,
)
from .functions.randomness import dropout, rand, random_seed
from .functions.reductions import all, mean, prod, rms_norm, softmax, sum, var
from .loops import dynamic_range, fori_loop, no_reorder, while_loop
from .memory import MemoryRegion
from .nki_object import NKIObject
from .ops import OPS
from .rules import documented
from .runtime import current
from .tensor import DynamicSlice, NkiTensor
from .tile_size import tile_size

_GRID_AXIS = documented(
    "program.axis",
    "nki.language.program_id, num_programs; nki.jit (kernel[lnc])",
    "the launch grid has one axis, number 0",
)

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
private_hbm = MemoryRegion.private_hbm
hbm = private_hbm
shared_hbm = MemoryRegion.shared_hbm
ds = DynamicSlice


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """range()."""
    return range(start) if stop is None else range(start, stop, step)


sequential_range = affine_range
static_range = affine_range


def program_id(axis: int = 0) -> int:
    """This core's number in the launch grid."""
    name = "nki.language.program_id"
    if axis != 0:
        fail(_GRID_AXIS, name, f"axis={axis!r}")
    return current(name).program_id


def num_programs(axes: int | tuple[int, ...] | None = 0) -> int:
    """Cores in the launch grid."""
    name = "nki.language.num_programs"
    if axes not in (0, None, (0,)):
        fail(_GRID_AXIS, name, f"axes={axes!r}")
    return current(name).num_programs


def nc(count: int) -> int:
    """Cores of the launch grid: kernel[nl.nc(2)] is kernel[2]."""
    return count


def program_ndim() -> int:
    """Axes of the launch grid: 0 without a grid."""
    return int(current("nki.language.program_ndim").world.has_grid)


globals().update(OPS)

__all__ = [
    "DType",
    "DynamicSlice",
    "MemoryRegion",
    "NKIObject",
    "NkiTensor",
    "affine_range",
    "all",
    "bfloat16",
    "bool_",
    "broadcast_to",
    "ceil",
    "cos",
    "device_print",
    "dropout",
    "ds",
    "dynamic_range",
    "empty_like",
    "expand_dims",
    "float16",
    "float32",
    "float4_e2m1fn_x4",
    "float8_e4m3",
    "float8_e4m3fn",
    "float8_e4m3fn_x4",
    "float8_e5m2",
    "float8_e5m2_x4",
    "float8_e8m0fnu",
    "floor",
    "fori_loop",
    "full",
    "gather_flattened",
    "hbm",
    "int16",
    "int32",
    "int8",
    "is_hbm",
    "is_on_chip",
    "is_psum",
    "is_sbuf",
    "load",
    "load_transpose2d",
    "logical_not",
    "matmul",
    "mean",
    "nc",
    "ndarray",
    "negative",
    "no_reorder",
    "num_programs",
    "ones",
    "private_hbm",
    "prod",
    "program_id",
    "program_ndim",
    "psum",
    "rand",
    "random_seed",
    "rms_norm",
    "sbuf",
    "sequential_range",
    "shared_constant",
    "shared_hbm",
    "shared_identity_matrix",
    "softmax",
    "static_range",
    "store",
    "sum",
    "tan",
    "tfloat32",
    "tile_size",
    "transpose",
    "trunc",
    "uint16",
    "uint32",
    "uint8",
    "var",
    "where",
    "while_loop",
    "zeros",
    "zeros_like",
    *OPS,
]

for _name in __all__:
    if inspect.isfunction(globals()[_name]) and globals()[_name] is not affine_range:  # as range()
        globals()[_name] = guarded("nki.language", globals()[_name])
