"""DMA: dma_copy between HBM and SBUF.

Equal dtypes move bits; different ones go through fp32. Bytes that were never written may travel
(padding), with a warning. Run-time addresses: dynamic.py.

Source: nki.isa.dma_copy; NKI migration guide (no PSUM, hardware DGE dtypes).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import check_once, mark, unwritten
from nxd_cp.simulators.nki_api.dynamic import IndirectTensor, out_of_bounds, rows
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import FRESH, OTHER
from nxd_cp.simulators.nki_api.log import DYNAMIC, SKIPPED
from nxd_cp.simulators.nki_api.memory import PSUM
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import dge_mode as modes
from .enums import engine as engines
from .enums import oob_mode as oob_modes
from .issue import NkiInstruction, issue
from .members import member

_PAGE = "nki.isa.dma_copy"
_PLACES = documented("dma_copy.memory", _PAGE, "src and dst are tensors in HBM or SBUF")
_SIZES = documented("dma_copy.elements", _PAGE, "src and dst have as many elements, at least one")
_MODE = documented(
    "dma_copy.mode",
    _PAGE,
    "hwdge needs gen3 and equal dtypes; engine only with hwdge (sync or scalar); "
    "priority 0 to 3 only on gen4",
)
_DYNAMIC = documented(
    "dma_copy.dynamic",
    _PAGE,
    "a run-time address needs a dge_mode other than none, a vector of them other than hwdge, and "
    "one row of both tensors for each",
)
_PADDING = inferred(
    "dma_copy.uninitialised",
    "nki.language guide, Creating Tensors",
    "a DMA moves memory that was written",
)


def dma_copy(
    dst: Any,
    src: Any,
    priority: int | None = None,
    oob_mode: Any = oob_modes.error,
    dge_mode: Any = modes.unknown,
    engine: Any = engines.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """dst = src by DMA, in row-major element order."""
    instr = "nki.isa.dma_copy"
    run = current(instr)
    if type(dge_mode) is not modes or type(oob_mode) is not oob_modes:
        dge_mode = member(instr, modes, dge_mode)
        oob_mode = member(instr, oob_modes, oob_mode)
    for role, tensor in (("dst", dst), ("src", src)):
        if not isinstance(tensor, NkiTensor) or tensor.space == PSUM:
            fail(_PLACES, instr, f"{role} is not in HBM or SBUF", **{role: tensor})
    if (dst.shape != src.shape and dst.size != src.size) or not dst.size:
        fail(_SIZES, instr, f"{src.size} elements into {dst.size}", dst=dst, src=src)
    if dge_mode is not modes.unknown or engine is not engines.unknown or priority is not None:
        _check_mode(instr, run, dst, src, priority, dge_mode, engine)
    if type(dst) is IndirectTensor or type(src) is IndirectTensor:
        return _copy_dynamic(instr, run, dst, src, oob_mode, dge_mode, name)
    if src.storage.init.uniform <= 0:
        check_padding(instr, src)
    if src.storage.watch is not None or dst.storage.watch is not None:
        watch(instr, run, dst, src)
    if dst.storage.init.uniform != OTHER:
        mark(dst, OTHER)
    check_once(instr, "dst", dst)
    if run.values:
        _move(run, dst, src)
    detail = dge_mode.name if engine is engines.unknown else f"{dge_mode.name}:{engine.name}"
    return issue(run, "dma_copy", "dma", dst, (src,), dst.size, detail=detail, name=name)


def _copy_dynamic(
    instr: str,
    run: Run,
    dst: NkiTensor,
    src: NkiTensor,
    oob_mode: Any,
    mode: Any,
    name: str | None,
) -> NkiInstruction:
    """The copy with an address known at run time, row by row where a vector gives addresses."""
    indirect = [t for t in (dst, src) if isinstance(t, IndirectTensor)]
    count = max((t.shape[0] for t in indirect if t.vector), default=1)
    rowwise = all(t.shape[0] == count for t in (dst, src))
    rowwise = rowwise and all(t.index.size == count for t in indirect if t.vector)
    legal = mode is not modes.none and (mode is not modes.hwdge or count == 1)
    if not legal or (count > 1 and not rowwise):
        fail(_DYNAMIC, instr, f"dge_mode={mode}", dst=dst, src=src)
    flags = DYNAMIC
    pairs = zip(rows(instr, run, dst, count), rows(instr, run, src, count), strict=True)
    for to, piece in pairs:
        if to is None or piece is None:
            if oob_mode is not oob_modes.skip:
                out_of_bounds(instr, dst, src)
            flags |= SKIPPED
            continue
        check_padding(instr, piece)
        watch(instr, run, to, piece)
        mark(to, OTHER)
        if run.values:
            _move(run, to, piece)
    tiles = (src, *(t.index for t in indirect))
    return issue(run, "dma_copy", "dma", dst, tiles, dst.size, flags, mode.name, name)


def watch(instr: str, run: Run, dst: NkiTensor | None, *sources: NkiTensor) -> None:
    """Report conflicting accesses to HBM that two cores share."""
    core = run.place.core
    for src in sources:
        if src.storage.watch is not None:
            src.storage.watch.read(core, instr, src)
    if dst is not None and dst.storage.watch is not None:
        known = len(sources) == 1 and run.values
        new = functools.partial(_converted, dst, sources[0]) if known else None
        dst.storage.watch.write(core, instr, dst, new, run.values)


def _move(run: Run, dst: NkiTensor, src: NkiTensor) -> None:
    if dst.storage.watch is not None and run.params.adversarial is not None:
        entry = (run.place.core, dst.array, _converted(dst, src).copy())
        dst.storage.watch.late.append(entry)
        return
    values, out = src.array, dst.array
    if values.shape != out.shape:
        values = values.reshape(out.shape)
    if dst.dtype is src.dtype:
        out[...] = values
    else:
        dtypes.store_f32(out, dtypes.to_f32(values, src.dtype), dst.dtype)


def _converted(dst: NkiTensor, src: NkiTensor) -> Any:
    """The elements of src in dst's shape and dtype."""
    values = src.array.reshape(dst.shape)
    if dst.dtype is src.dtype:
        return values
    out = np.empty(dst.shape, dst.storage.stored_as(dst.dtype))
    dtypes.store_f32(out, dtypes.to_f32(values, src.dtype), dst.dtype)
    return out


def _check_mode(
    instr: str, run: Run, dst: Any, src: Any, priority: int | None, mode: Any, engine: Any
) -> None:
    hardware = mode is modes.hwdge
    legal = not hardware or (run.chip.hardware_dge and dst.dtype is src.dtype)
    if engine is not engines.unknown:
        legal = legal and hardware and engine in (engines.sync, engines.scalar)
    if priority is not None:
        legal = legal and run.chip.dma_priority and 0 <= priority <= 3
    if not legal:
        fail(
            _MODE,
            instr,
            f"dge_mode={mode}, engine={engine}, priority={priority} on {run.chip.generation}",
            dst=dst,
            src=src,
        )


def check_padding(instr: str, src: NkiTensor) -> None:
    """Warn if a DMA moves bytes that were never written."""
    storage = src.storage
    if not unwritten(src):
        return
    if storage.init.uniform == FRESH:
        storage.fill()
    broken(_PADDING, instr, "src was never written (or only in part)", src=src)
