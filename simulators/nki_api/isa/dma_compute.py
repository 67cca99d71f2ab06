"""dma_compute: the sum of tensors on their way, also onto rows chosen by index.

With an index it reads, adds and writes back: dst[index] += src in HBM, or dst += src[index] in
SBUF. All arithmetic is fp32, rounded once.

Source: nki.isa.dma_compute.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import check_once, mark
from nxd_cp.simulators.nki_api.dynamic import IndirectTensor, out_of_bounds, rows
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import DYNAMIC, SKIPPED
from nxd_cp.simulators.nki_api.memory import HBM, PSUM, SBUF
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .dma import check_padding, watch
from .enums import oob_mode as oob_modes
from .issue import NkiInstruction, issue
from .members import member

_COMPUTE = documented(
    "dma_compute.operands",
    "nki.isa.dma_compute",
    "1 to 16 sources and dst in HBM or SBUF, of equal size; reduce_op is nl.add, scales are 1.0; "
    "oob_mode.skip only with indirect addresses",
)
_INDIRECT = documented(
    "dma_compute.indirect",
    "nki.isa.dma_compute (Read-Modify-Write with vector_offset)",
    "two sources, unique indices; either dst in HBM with a vector_offset, one source alike and one "
    "in SBUF, or dst in SBUF, one source alike and one in HBM with a vector_offset",
)


def dma_compute(
    dst: Any,
    srcs: Any,
    reduce_op: Any,
    scales: Any = None,
    unique_indices: bool = True,
    oob_mode: Any = oob_modes.error,
    name: str | None = None,
) -> NkiInstruction:
    """dst = sum of the sources, element by element, in fp32."""
    instr = "nki.isa.dma_compute"
    run = current(instr)
    sources, oob_mode = list(srcs), member(instr, oob_modes, oob_mode)
    plain = scales is None or all(scale == 1.0 for scale in scales)
    if reduce_op is not OPS["add"] or not plain or not 1 <= len(sources) <= 16:
        detail = f"{len(sources)} sources, reduce_op={reduce_op}, scales={scales}"
        fail(_COMPUTE, instr, detail, dst=dst)
    for tensor in (dst, *sources):
        if not isinstance(tensor, NkiTensor) or tensor.space == PSUM or tensor.size != dst.size:
            fail(_COMPUTE, instr, "place or size of an operand", dst=dst, src=tensor)
    if any(isinstance(tensor, IndirectTensor) for tensor in (dst, *sources)):
        return _indirect(instr, run, dst, sources, unique_indices, oob_mode, name)
    if oob_mode is not oob_modes.error:
        fail(_COMPUTE, instr, "oob_mode without indirect addresses", dst=dst)
    for tensor in sources:
        check_padding(instr, tensor)
    watch(instr, run, dst, *sources)
    mark(dst, OTHER)
    check_once(instr, "dst", dst)
    if run.values:
        _add(dst, sources)
    # A record has room for five sources; the destination's size still counts all bytes moved.
    return issue(run, "dma_compute", "dma", dst, tuple(sources[:5]), dst.size, 0, "none", name)


def _add(dst: NkiTensor, sources: list[NkiTensor]) -> None:
    out = dst.array
    total = dtypes.to_f32(sources[0].array, sources[0].dtype).reshape(out.shape)
    for tensor in sources[1:]:
        total = total + dtypes.to_f32(tensor.array, tensor.dtype).reshape(out.shape)
    dtypes.store_f32(out, total, dst.dtype)


def _alike(a: NkiTensor, b: NkiTensor) -> bool:
    """Whether two operands are the same view, by the same index."""
    same = a.storage is b.storage and (a.offset, a.shape, a.strides) == (
        b.offset,
        b.shape,
        b.strides,
    )
    index = getattr(a, "index", None), getattr(b, "index", None)
    if isinstance(index[0], NkiTensor) and isinstance(index[1], NkiTensor):
        return same and index[0].storage is index[1].storage and index[0].offset == index[1].offset
    return same and index == (None, None)


def _indirect(
    instr: str,
    run: Run,
    dst: NkiTensor,
    sources: list[NkiTensor],
    unique: bool,
    oob_mode: Any,
    name: str | None,
) -> NkiInstruction:
    """Read, add and write back, row by row."""
    others = [tensor for tensor in sources if not _alike(tensor, dst)]
    legal = len(sources) == 2 and len(others) == 1 and unique
    vector = dst if isinstance(dst, IndirectTensor) else others[0] if others else None
    legal = legal and isinstance(vector, IndirectTensor) and vector.vector
    spaces = (dst.space, others[0].space) if others else ()
    legal = legal and spaces == ((HBM, SBUF) if vector is dst else (SBUF, HBM))
    if not legal or not isinstance(vector, IndirectTensor):
        fail(_INDIRECT, instr, f"{len(sources)} sources, unique_indices={unique}", dst=dst)
    count, flags = vector.shape[0], DYNAMIC
    targets, added = rows(instr, run, dst, count), rows(instr, run, others[0], count)
    seen = [piece.offset for piece in (targets if vector is dst else added) if piece is not None]
    if run.values and len(set(seen)) != len(seen):
        fail(_INDIRECT, instr, "an index occurs twice", dst=dst, index=vector.index)
    for to, piece in zip(targets, added, strict=True):
        if to is None or piece is None:
            if oob_mode is not oob_modes.skip:
                out_of_bounds(instr, dst, others[0])
            flags |= SKIPPED
            continue
        for tensor in (to, piece):
            check_padding(instr, tensor)
        watch(instr, run, to, to, piece)
        mark(to, OTHER)
        if run.values:
            _add(to, [to, piece])
    tiles = (*sources, vector.index)
    return issue(run, "dma_compute", "dma", dst, tiles, dst.size, flags, "none", name)
