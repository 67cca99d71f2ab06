"""TensorE: nc_matmul.

PSUM accumulation follows the documented flags: accumulate=False overwrites, True adds onto a
matmul's result, None overwrites what no matmul has written yet and adds otherwise. Sums run in
fp32 over one instruction's K rows at a time. Tensor indirection is not implemented.

Letters: K contraction (partitions), M stationary columns, N moving columns.
Source: nki.isa.nc_matmul; architecture guide, PSUM accumulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    copied,
    destination,
    in_psum,
    in_sbuf,
    like,
    mark_moved,
    require,
    source,
)
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import FRESH, MATMUL, OTHER, ZEROED
from nxd_cp.simulators.nki_api.log import ACCUMULATE, DOUBLE_ROW, ONEZERO, TRANSPOSE
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import matmul_perf_mode
from .issue import NkiInstruction, issue
from .matmul_checks import check_shapes, check_tiling, check_types, double_rows
from .members import member
from .nc_transpose import PADDING

_PAGE = "nki.isa.nc_matmul"
_PLACES = documented("nc_matmul.memory", _PAGE, "inputs come from SBUF, dst is in PSUM")
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
_ZEROED = inferred(
    "nc_matmul.accumulate_zeroed",
    "our reading of nki.isa.nc_matmul (accumulate=None, and its note on memset)",
    "before gen4 nothing but a matmul sets PSUM that accumulate=None writes first",
)
_PARTIAL = inferred(
    "nc_matmul.accumulate_mixed",
    "our reading of nki.isa.nc_matmul",
    "accumulate=None covers memory that is all first-written or all accumulated",
)


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
    moves = is_transpose and accumulate is not True and run.chip.exact_transpose
    if moves:
        a, written = copied(instr, "stationary", stationary, PADDING)
    else:
        a, written = source(instr, "stationary", stationary), None
    b = source(instr, "moving", moving)
    double = member(instr, matmul_perf_mode, perf_mode) is not matmul_perf_mode.none
    check_types(run, dst, stationary, moving, is_transpose, double)
    if double:
        a, b = double_rows(run, stationary, moving, a, b, tile_size)
    else:
        a = a if a.ndim == 2 else a.reshape(a.shape[0], -1)
        b = b if b.ndim == 2 else b.reshape(b.shape[0], -1)
    check_shapes(run, dst, stationary, moving, a.shape, b.shape)
    if tile_position != () or tile_size != ():
        check_tiling(run, dst, stationary, moving, tile_position, tile_size)
    add = _accumulates(run, dst, stationary, moving, accumulate)
    out = destination(instr, "dst", dst, MATMUL)
    if run.values:
        wide = dtypes.to_f32(a, stationary.dtype), dtypes.to_f32(b, moving.dtype)
        order = _picked(wide[1]) if moves and add is False else None
        if written is not None:
            _move_padding(stationary, dst, written, order)
        if order is not None and stationary.dtype is dst.dtype:
            out[...] = like(a[order].T, out.shape)
        else:
            _multiply(wide, add, out, dst.dtype)
    bits = ACCUMULATE if add is not False else 0
    bits |= TRANSPOSE if is_transpose else 0
    bits |= DOUBLE_ROW if double else 0
    bits |= ONEZERO if is_stationary_onezero or is_moving_onezero else 0
    if tile_size != ():
        bits |= tile_size[0] % 128 << 8 | tile_size[1] % 128 << 16
    tiles = (stationary, moving)
    return issue(run, "nc_matmul", "tensor", dst, tiles, int(b.shape[1]), bits, name=name)


def _picked(choice: Any) -> Any:
    """Transpose mode: the row that every column of `choice` picks, or None if one picks none."""
    picks = (choice == 1).sum(axis=0) == 1
    if not picks.all() or np.count_nonzero(choice) != choice.shape[1]:
        return None
    return choice.argmax(axis=0)


def _move_padding(stationary: NkiTensor, dst: NkiTensor, written: Any, order: Any) -> None:
    """A transpose leaves unwritten what was; a product would mix it with everything else."""
    if order is None:
        source("nki.isa.nc_matmul", "stationary", stationary)
    else:
        mark_moved(dst, written.reshape(written.shape[0], -1)[order].T, MATMUL)


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


def _accumulates(
    run: Run, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, accumulate: Any
) -> Any:
    """True or False, or a boolean array where accumulate=None finds both kinds of memory."""
    if accumulate is not None and not accumulate:
        return False
    init, region = dst.storage.own, dst.own_region
    if accumulate is not None or init is None:  # else what counts is this tensor's own first write
        init, region = dst.storage.init, dst.region
    codes = init.codes(region)
    if accumulate is None and codes <= {FRESH, ZEROED}:
        if ZEROED in codes and not run.chip.matmul_on_foreign_psum:
            broken(_ZEROED, "nki.isa.nc_matmul", "dst was set by memset", dst=dst)
        return False
    operands = {"dst": dst, "stationary": stationary, "moving": moving}
    instr = "nki.isa.nc_matmul"
    if accumulate is not None and FRESH in codes:
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
        written = init.written(region)
        return written if written.ndim == dst.ndim else written.all(axis=-1)
    return True
