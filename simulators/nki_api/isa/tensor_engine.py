"""TensorE: nc_matmul and nc_transpose.

PSUM accumulation follows the documented flags: accumulate=False overwrites, True adds onto a
matmul's result, None overwrites what no matmul has written yet and adds otherwise. Sums run in
fp32 over one instruction's K rows at a time. Tensor indirection is not implemented.

Letters: K contraction (partitions), M stationary columns, N moving columns.
Source: nki.isa.nc_matmul, nki.isa.nc_transpose; architecture guide, PSUM accumulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import destination, in_psum, in_sbuf, like, require, source
from nxd_cp.simulators.nki_api.chips import PSUM_BANK_BYTES
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import FRESH, MATMUL, MIXED, OTHER, ZEROED
from nxd_cp.simulators.nki_api.log import ACCUMULATE, DOUBLE_ROW, ONEZERO, TRANSPOSE
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import engine as engines
from .enums import matmul_perf_mode
from .issue import NkiInstruction, issue

_PAGE = "nki.isa.nc_matmul"
_PLACES = documented("nc_matmul.memory", _PAGE, "inputs come from SBUF, dst is in PSUM")
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
_FIRST = documented(
    "nc_matmul.accumulate_first",
    _PAGE,
    "accumulate=True needs memory that a matmul has written before",
)
_FOREIGN = documented(
    "nc_matmul.accumulate_foreign",
    _PAGE,
    "on gen2 and gen3 a matmul cannot accumulate onto another engine's values",
)
_PARTIAL = inferred(
    "nc_matmul.accumulate_mixed",
    "our reading of nki.isa.nc_matmul",
    "accumulate=None covers memory that is all first-written or all accumulated",
)
_DOUBLE = documented(
    "nc_matmul.double_row",
    _PAGE,
    "double_row needs gen3, fp8 inputs of shape [K, 2, free], no column tiling",
)
_TILING = documented(
    "nc_matmul.tile",
    _PAGE,
    "tile_position and tile_size come together; the start row is a multiple of "
    "the row size (128, 64, from gen3 32); stationary fits in the tile",
)
_TRANSPOSE = documented(
    "nc_transpose.operands",
    "nki.isa.nc_transpose",
    "dst has data's dtype and the transposed shape; TensorE reads SBUF "
    "[<=128, <=128] and writes PSUM, VectorE takes [<=32, <=32]",
)

_FP32 = frozenset((dtypes.float32, dtypes.tfloat32))
_TENSOR_TYPES = frozenset((*_FP32, dtypes.bfloat16, dtypes.float16, *dtypes.FLOAT8))


def nc_matmul(
    dst: Any,
    stationary: Any,
    moving: Any,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: Any = None,
    tile_position: Any = (),
    tile_size: Any = (),
    perf_mode: Any = matmul_perf_mode.none,
    name: str | None = None,
) -> NkiInstruction:
    """dst[M, N] (+)= stationary[K, M].T @ moving[K, N] on TensorE."""
    instr = "nki.isa.nc_matmul"
    run = current(instr)
    if not in_psum(dst):
        fail(_PLACES, instr, "dst must be in PSUM", dst=dst)
    in_sbuf(instr, stationary=stationary, moving=moving)
    a = source(instr, "stationary", stationary)
    b = source(instr, "moving", moving)
    double = perf_mode is not matmul_perf_mode.none
    _check_types(run, dst, stationary, moving, is_transpose, double)
    if double:
        a, b = _double_rows(run, stationary, moving, a, b, tile_size)
    else:
        a = a if a.ndim == 2 else a.reshape(a.shape[0], -1)
        b = b if b.ndim == 2 else b.reshape(b.shape[0], -1)
    _check_shapes(run, dst, stationary, moving, a.shape, b.shape)
    if tile_position != () or tile_size != ():
        _check_tiling(run, stationary, tile_position, tile_size)
    add = _accumulates(run, dst, stationary, moving, accumulate)
    out = destination(instr, "dst", dst, MATMUL)
    if run.values:
        wide = dtypes.to_f32(a, stationary.dtype), dtypes.to_f32(b, moving.dtype)
        exact = is_transpose and add is False and run.chip.exact_transpose
        if not (exact and _permuted(a, wide[1], out, stationary.dtype is dst.dtype)):
            _multiply(wide, add, out, dst.dtype)
    bits = ACCUMULATE if add is not False else 0
    bits |= TRANSPOSE if is_transpose else 0
    bits |= DOUBLE_ROW if double else 0
    bits |= ONEZERO if is_stationary_onezero or is_moving_onezero else 0
    if tile_size != ():
        bits |= tile_size[0] % 128 << 8 | tile_size[1] % 128 << 16
    tiles = (stationary, moving)
    return issue(run, "nc_matmul", "tensor", dst, tiles, int(b.shape[1]), bits, name=name)


def _permuted(a: Any, choice: Any, out: Any, same: bool) -> bool:
    """Transpose mode: out = a.T bit by bit, if every column of `choice` picks one row of `a`."""
    picks = (choice == 1).sum(axis=0) == 1
    if not same or not picks.all() or np.count_nonzero(choice) != choice.shape[1]:
        return False
    out[...] = like(a[choice.argmax(axis=0)].T, out.shape)
    return True


def _multiply(wide: tuple[Any, Any], add: Any, out: Any, dtype: dtypes.DType) -> None:
    """out (+)= wide[0].T @ wide[1]; an array `add` says where to add."""
    if add is False and dtype is dtypes.float32 and out.ndim == 2:
        np.matmul(wide[0].T, wide[1], out=out)
        return
    product = like(np.matmul(wide[0].T, wide[1]), out.shape)
    if add is True and dtype is dtypes.float32:
        np.add(product, out, out=out)
        return
    if add is not False:
        old = dtypes.to_f32(out, dtype)
        product += old if add is True else np.where(add, old, np.float32(0))
    dtypes.store_f32(out, product, dtype)


def _check_types(
    run: Run,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    transpose: bool,
    double: bool,
) -> None:
    s, m, gen4 = stationary.dtype, moving.dtype, run.chip.number >= 4
    legal = s in _TENSOR_TYPES and m in _TENSOR_TYPES and (s in _FP32) == (m in _FP32)
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
    if double and not (run.chip.number >= 3 and s in dtypes.FLOAT8 and m in dtypes.FLOAT8):
        fail(
            _DOUBLE,
            "nki.isa.nc_matmul",
            f"{s} x {m} on {run.chip.generation}",
            stationary=stationary,
            moving=moving,
        )


def _double_rows(
    run: Run, stationary: NkiTensor, moving: NkiTensor, a: Any, b: Any, tile_size: Any
) -> tuple[Any, Any]:
    columns_tiled = tile_size != () and tile_size[1] != 128
    if a.ndim < 3 or b.ndim < 3 or a.shape[1] != 2 or b.shape[1] != 2 or columns_tiled:
        fail(_DOUBLE, "nki.isa.nc_matmul", "shape or tiling", stationary=stationary, moving=moving)
    return a.reshape(2 * a.shape[0], -1), b.reshape(2 * b.shape[0], -1)


def _check_shapes(
    run: Run,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    a: tuple[int, ...],
    b: tuple[int, ...],
) -> None:
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
        fail(_MOVING, "nki.isa.nc_matmul", f"N is {b[1]} on {chip.generation}", moving=moving)
    if chip.matmul_dst_in_one_bank:
        rect, at = dst.rect, dst.storage.address
        if (at + rect[2]) // PSUM_BANK_BYTES != (at + rect[3] - 1) // PSUM_BANK_BYTES:
            fail(
                _BANK,
                "nki.isa.nc_matmul",
                f"dst takes bytes {at + rect[2]}..{at + rect[3]}",
                dst=dst,
            )


def _check_tiling(run: Run, stationary: NkiTensor, position: Any, size: Any) -> None:
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


def _accumulates(
    run: Run, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, accumulate: Any
) -> Any:
    """True or False, or a boolean array where accumulate=None finds both kinds of memory."""
    if accumulate is not None and not accumulate:
        return False
    init = dst.storage.init
    rect, pattern = dst.rect, dst.pattern
    if accumulate is None and dst.storage.own is not None:
        init = dst.storage.own  # first write by this tensor, whatever else used the address
        rect, pattern = dst.own_place
    codes = {init.uniform} if init.uniform != MIXED else init.codes(rect, dst.dense, pattern)
    operands = {"dst": dst, "stationary": stationary, "moving": moving}
    instr = "nki.isa.nc_matmul"
    if accumulate is None:
        if codes <= {FRESH, ZEROED}:
            return False
    elif FRESH in codes:
        fail(_FIRST, instr, "accumulate=True onto PSUM that was never written", **operands)
    foreign = OTHER in codes or (ZEROED in codes and accumulate is not None)
    if foreign and not run.chip.matmul_on_foreign_psum:
        fail(
            _FOREIGN,
            instr,
            f"accumulates on {run.chip.generation} onto values that another engine wrote",
            **operands,
        )
    if FRESH in codes:
        require(False, _PARTIAL, instr, "part of dst was never written", **operands)
        written = init.cell_view(pattern) != FRESH
        return written if written.ndim == dst.ndim else written.all(axis=-1)
    return True


def nc_transpose(
    dst: Any, data: Any, engine: Any = engines.unknown, name: str | None = None
) -> NkiInstruction:
    """dst[F, P] = data[P, F].T on TensorE (SBUF to PSUM) or VectorE (up to 32 x 32)."""
    instr = "nki.isa.nc_transpose"
    run = current(instr)
    values = source(instr, "data", data)
    flat = values if values.ndim == 2 else values.reshape(values.shape[0], -1)
    rows, columns = flat.shape
    small = rows <= 32 and columns <= 32
    on_tensor = engine is engines.tensor or (
        engine is engines.unknown and (not small or (in_psum(dst) and not in_psum(data)))
    )
    legal = dst.dtype is data.dtype and (dst.shape[0], dst.size // dst.shape[0]) == (columns, rows)
    if on_tensor:
        legal = legal and in_psum(dst) and not in_psum(data) and columns <= 128
    else:
        legal = legal and small and engine in (engines.vector, engines.unknown)
    if not legal:
        fail(
            _TRANSPOSE,
            instr,
            f"{data.shape} -> {dst.shape} on {'tensor' if on_tensor else 'vector'} engine",
            dst=dst,
            data=data,
        )
    out = destination(instr, "dst", dst, MATMUL if on_tensor else OTHER)
    if not run.values:
        pass
    elif on_tensor and not run.chip.exact_transpose and not _finite(flat, data.dtype):
        wide = dtypes.to_f32(flat, data.dtype)
        result = np.matmul(wide.T, np.eye(rows, dtype=np.float32))
        dtypes.store_f32(out, like(result, out.shape), dst.dtype)
    else:
        out[...] = like(flat.T, out.shape)
    unit, elements = ("tensor", rows) if on_tensor else ("vector", columns)
    return issue(run, "nc_transpose", unit, dst, (data,), int(elements), name=name)


def _finite(array: Any, dtype: dtypes.DType) -> bool:
    if dtype.kind != "f":
        return True
    return bool(np.isfinite(dtypes.to_f32(array, dtype)).all())
