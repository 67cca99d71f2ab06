"""What nc_matmul demands of its operands: dtypes, sizes, tiles, per generation.

Letters: K contraction (partitions), M stationary columns, N moving columns.
Source: nki.isa.nc_matmul; architecture guide, PSUM.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import require
from nxd_cp.simulators.nki_api.chips import PSUM_BANK_BYTES
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

_PAGE = "nki.isa.nc_matmul"
_SHAPES = documented(
    "nc_matmul.shape",
    _PAGE,
    "stationary [K, M] and moving [K, N] give dst [M, N]; K and M at most 128",
)
_MOVING = documented(
    "nc_matmul.moving_free",
    _PAGE,
    "N is at most 512 (gen4: 4096 for a float32 dst, 8192 for bfloat16)",
)
_BANK = documented(
    "nc_matmul.bank",
    "architecture guide, PSUM",
    "before gen4 the output fits in one 2 KiB PSUM bank per partition",
)
_INPUTS = documented(
    "nc_matmul.input_dtype",
    _PAGE,
    "inputs are float types of TensorE; float32 and tfloat32 only pair with each "
    "other; float8_e4m3fn needs gen4 and never meets float8_e4m3",
)
_OUTPUT = documented(
    "nc_matmul.dst_dtype",
    _PAGE,
    "dst is float32 (gen4: or bfloat16; transpose mode from gen3: as the input)",
)
_DOUBLE = documented(
    "nc_matmul.double_row",
    _PAGE,
    "double_row needs gen3, fp8 inputs of shape [K, 2, free], no column tiling, no transpose mode",
)
_TILING = documented(
    "nc_matmul.tile",
    _PAGE,
    "tile_position and tile_size come together; the start row is a multiple of "
    "the row size (128, 64, from gen3 32); stationary fits in the tile",
)

_PLACED = inferred(
    "nc_matmul.tile_partitions",
    "our reading of nki.isa.nc_matmul (Tiling mode); nki-library@d2ad3a5 does so",
    "operands that were given a place start on the tile's first row, dst on its first column",
)

_FP32 = frozenset((dtypes.float32, dtypes.tfloat32))
TENSOR_TYPES = frozenset((*_FP32, dtypes.bfloat16, dtypes.float16, *dtypes.FLOAT8))


def check_types(
    run: Run,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    transpose: bool,
    double: bool,
) -> None:
    """Dtypes of a matmul on this generation."""
    s, m, gen4 = stationary.dtype, moving.dtype, run.chip.number >= 4
    legal = s in TENSOR_TYPES and m in TENSOR_TYPES and (s in _FP32) == (m in _FP32)
    if dtypes.float8_e4m3fn in (s, m):
        legal = legal and gen4 and dtypes.float8_e4m3 not in (s, m)
    if not legal:
        fail(
            _INPUTS,
            "nki.isa.nc_matmul",
            f"{s} x {m} on {run.chip.generation}",
            stationary=stationary,
            moving=moving,
        )
    if transpose and run.chip.exact_transpose:
        legal = dst.dtype is m
    else:
        legal = dst.dtype is dtypes.float32 or (gen4 and dst.dtype is dtypes.bfloat16)
    require(
        legal,
        _OUTPUT,
        "nki.isa.nc_matmul",
        f"dst is {dst.dtype} on {run.chip.generation}",
        dst=dst,
        moving=moving,
    )
    fast = run.chip.number >= 3 and s in dtypes.FLOAT8 and m in dtypes.FLOAT8 and not transpose
    if double and not fast:
        fail(
            _DOUBLE,
            "nki.isa.nc_matmul",
            f"{s} x {m} on {run.chip.generation}",
            stationary=stationary,
            moving=moving,
        )


def double_rows(
    run: Run, stationary: NkiTensor, moving: NkiTensor, a: Any, b: Any, tile_size: Any
) -> tuple[Any, Any]:
    """The operands of double_row as [2 K, free]: both rows are contracted."""
    columns_tiled = tile_size != () and tile_size[1] != 128
    if a.ndim < 3 or b.ndim < 3 or a.shape[1] != 2 or b.shape[1] != 2 or columns_tiled:
        fail(_DOUBLE, "nki.isa.nc_matmul", "shape or tiling", stationary=stationary, moving=moving)
    return a.reshape(2 * a.shape[0], -1), b.reshape(2 * b.shape[0], -1)


def check_shapes(
    run: Run,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    a: tuple[int, ...],
    b: tuple[int, ...],
) -> None:
    """Sizes of a matmul, and the PSUM banks that its result touches."""
    columns = dst.size // dst.shape[0]
    if (
        stationary.shape[0] != moving.shape[0]
        or a[1] != dst.shape[0]
        or b[1] != columns
        or a[1] > 128
    ):
        fail(
            _SHAPES,
            "nki.isa.nc_matmul",
            f"{stationary.shape} x {moving.shape} -> {dst.shape}",
            dst=dst,
            stationary=stationary,
            moving=moving,
        )
    chip = run.chip
    limit = chip.matmul_moving_bf16 if dst.dtype is dtypes.bfloat16 else chip.matmul_moving_fp32
    if b[1] > max(limit, chip.matmul_moving_fp32):
        broken(_MOVING, "nki.isa.nc_matmul", f"N is {b[1]} on {chip.generation}", moving=moving)
    if chip.matmul_dst_in_one_bank:
        rect, at = dst.rect, dst.storage.address
        if (at + rect[2]) // PSUM_BANK_BYTES != (at + rect[3] - 1) // PSUM_BANK_BYTES:
            broken(
                _BANK,
                "nki.isa.nc_matmul",
                f"dst takes bytes {at + rect[2]}..{at + rect[3]}",
                dst=dst,
            )


def check_tiling(
    run: Run,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    position: Any,
    size: Any,
) -> None:
    """Row and column tiling of the array."""
    legal = len(position) == 2 and len(size) == 2
    if legal:
        sizes = (128, 64) if run.chip.number < 3 else (128, 64, 32)
        legal = size[0] in sizes and size[1] in sizes
        legal = legal and position[0] % size[0] == 0 and position[1] % size[1] == 0
        legal = legal and position[0] + size[0] <= 128 and position[1] + size[1] <= 128
        columns = stationary.size // stationary.shape[0]
        legal = legal and stationary.shape[0] <= size[0] and columns <= size[1]
    if not legal:
        fail(
            _TILING,
            "nki.isa.nc_matmul",
            f"tile_position={position}, tile_size={size}",
            stationary=stationary,
        )
    for role, tensor, wanted in (
        ("stationary", stationary, position[0]),
        ("moving", moving, position[0]),
        ("dst", dst, position[1]),
    ):
        given = tensor.storage.own is not None or tensor.storage.partitions > tensor.shape[0]
        start = tensor.partition_start
        if given and start != wanted:
            detail = f"tile_position={position}, {role} starts on partition {start}"
            broken(_PLACED, "nki.isa.nc_matmul", detail, **{role: tensor})
