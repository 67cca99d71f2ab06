"""dma_transpose: the first and last dims swapped on the way, also of rows gathered by index.

Rows whose index is out of bounds raise, or (oob_mode.skip) leave their part of dst as it is.

Source: nki.isa.dma_transpose.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import check_once, mark
from nxd_cp.simulators.nki_api.dynamic import IndirectTensor, out_of_bounds
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import DYNAMIC, SKIPPED, TRANSPOSE
from nxd_cp.simulators.nki_api.memory import HBM, SBUF
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .dma import check_padding, watch
from .enums import dge_mode as modes
from .enums import oob_mode as oob_modes
from .issue import NkiInstruction, issue
from .members import member

_TRANSPOSE = documented(
    "dma_transpose.operands",
    "nki.isa.dma_transpose",
    "src (HBM or SBUF) has 2 to 4 dims, dst (SBUF) has its dtype and its shape with the first and "
    "last dims swapped; axes, if given, says so",
)
_MODE = documented(
    "dma_transpose.mode",
    "nki.isa.dma_transpose",
    "dge_mode is unknown or hwdge; hwdge needs gen3, 2-byte elements, a last dim of at most 128 "
    "and a first dim of 16 (3 and 4 dims: 1, 2, 4, 8 or 16, times dim -2 a multiple of 16); "
    "priority 0 to 3 only on gen4; oob_mode.skip only with indirect addresses",
)
_NO_DGE = inferred(
    "dma_transpose.no_dge",
    "nki.isa.dma_transpose; nki-library@d2ad3a5 (mlp_tkg_gate_up_projection.py) gives none",
    "dge_mode is unknown or hwdge, not none",
)
_INDIRECT = documented(
    "dma_transpose.indirect",
    "nki.isa.dma_transpose (Indirect Transpose Constraints)",
    "from gen3, dge_mode unknown or swdge, src in HBM of 2-byte elements with a last dim of at "
    "most 128 and a multiple of 16 rows (4 dims: one of the middle ones is 1); the index is uint32 "
    "[16 to 128, a multiple of 16; 128 for several columns] with an element per row",
)
_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def dma_transpose(
    dst: Any,
    src: Any,
    axes: Any = None,
    priority: int | None = None,
    dge_mode: Any = modes.unknown,
    oob_mode: Any = oob_modes.error,
    name: str | None = None,
) -> NkiInstruction:
    """dst = src with its first and last dims swapped."""
    instr = "nki.isa.dma_transpose"
    run = current(instr)
    dge_mode, oob_mode = member(instr, modes, dge_mode), member(instr, oob_modes, oob_mode)
    tensors = type(dst) is NkiTensor and isinstance(src, NkiTensor)
    if not tensors or dst.space != SBUF or src.space not in (HBM, SBUF) or src.ndim not in _AXES:
        fail(_TRANSPOSE, instr, "memory or number of dims", dst=dst, src=src)
    order = _AXES[src.ndim]
    swapped = tuple(src.shape[a] for a in order)
    given = order if axes is None else tuple(axes)
    if given != order or swapped != dst.shape or dst.dtype is not src.dtype:
        fail(_TRANSPOSE, instr, f"axes={axes}, src permuted is {swapped}", dst=dst, src=src)
    if isinstance(src, IndirectTensor):
        return _indirect(instr, run, dst, src, order, (priority, dge_mode, oob_mode), name)
    _check_mode(instr, run, src, priority, dge_mode, oob_mode)
    check_padding(instr, src)
    watch(instr, run, None, src)
    mark(dst, OTHER)
    check_once(instr, "dst", dst)
    if run.values:
        dst.array[...] = src.array.transpose(order).copy()
    return issue(run, "dma_transpose", "dma", dst, (src,), dst.size, TRANSPOSE, dge_mode.name, name)


def _check_mode(
    instr: str, run: Run, src: NkiTensor, priority: int | None, mode: Any, oob_mode: Any
) -> None:
    if mode is modes.none:
        broken(_NO_DGE, instr, f"dge_mode={mode}", src=src)
    legal = mode is not modes.swdge and oob_mode is oob_modes.error
    if priority is not None:
        legal = legal and run.chip.dma_priority and 0 <= priority <= 3
    if mode is modes.hwdge:
        first, last, shape = src.shape[0], src.shape[-1], src.shape
        blocks = first == 16 if src.ndim == 2 else first in (1, 2, 4, 8, 16)
        blocks = blocks and (src.ndim == 2 or first * shape[-2] % 16 == 0)
        legal = legal and run.chip.hardware_dge and blocks
        legal = legal and last <= 128 and src.dtype.itemsize == 2
    if not legal:
        detail = f"dge_mode={mode}, priority={priority}, oob_mode={oob_mode}"
        fail(_MODE, instr, f"{detail} on {run.chip.generation}", src=src)


def _indirect(
    instr: str,
    run: Run,
    dst: NkiTensor,
    src: IndirectTensor,
    order: tuple[int, ...],
    options: tuple[Any, Any, Any],
    name: str | None,
) -> NkiInstruction:
    """The transpose of a tensor at a run-time address, or of rows gathered by a vector of them."""
    priority, mode, oob_mode = options
    legal = mode in (modes.unknown, modes.swdge) and run.chip.number >= 3
    if priority is not None:
        legal = legal and run.chip.dma_priority and 0 <= priority <= 3
    if src.vector:
        legal = legal and _gatherable(src)
    if not legal:
        detail = f"dge_mode={mode}, priority={priority} on {run.chip.generation}"
        fail(_INDIRECT, instr, detail, dst=dst, src=src, index=src.index)
    flags = TRANSPOSE | DYNAMIC
    pieces = src.pieces(instr, run)
    for at, piece in enumerate(pieces):
        if piece is None:
            if oob_mode is not oob_modes.skip:
                out_of_bounds(instr, dst, src)
            flags |= SKIPPED
            continue
        to = dst[..., at : at + 1] if src.vector else dst
        check_padding(instr, piece)
        watch(instr, run, None, piece)
        mark(to, OTHER)
        if run.values:
            to.array[...] = piece.array.transpose(order)
    tiles = (src, src.index)
    return issue(run, "dma_transpose", "dma", dst, tiles, dst.size, flags, mode.name, name)


def _gatherable(src: IndirectTensor) -> bool:
    """Whether the shapes and dtypes are those of a gather transpose."""
    rows, index = src.shape[0], src.index
    partitions, columns = index.shape[0], index.size // index.shape[0]
    legal = src.shape[-1] <= 128 and src.dtype.itemsize == 2 and rows % 16 == 0
    legal = legal and index.ndim == 2 and index.dtype is dtypes.uint32 and index.size >= rows
    legal = legal and 16 <= partitions <= 128 and partitions % 16 == 0
    legal = legal and (columns == 1 or partitions == 128)
    return bool(legal and (src.ndim < 4 or 1 in src.shape[1:3]))
