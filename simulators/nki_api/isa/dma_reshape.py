"""DMA that does more than move: dma_transpose and dma_compute.

Indirect (vector_offset) forms are not implemented.

Source: nki.isa.dma_transpose, nki.isa.dma_compute.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import mark
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import TRANSPOSE
from nxd_cp.simulators.nki_api.memory import HBM, PSUM, SBUF
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .dma import check_padding, watch
from .enums import dge_mode as modes
from .enums import oob_mode as oob_modes
from .issue import NkiInstruction, issue

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
_COMPUTE = documented(
    "dma_compute.operands",
    "nki.isa.dma_compute",
    "1 to 16 sources and dst in HBM or SBUF, of equal size; reduce_op is nl.add, scales are 1.0",
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
    tensors = type(dst) is NkiTensor and type(src) is NkiTensor
    if not tensors or dst.space != SBUF or src.space not in (HBM, SBUF) or src.ndim not in _AXES:
        fail(_TRANSPOSE, instr, "memory or number of dims", dst=dst, src=src)
    order = _AXES[src.ndim]
    swapped = tuple(src.shape[a] for a in order)
    given = order if axes is None else tuple(axes)
    if given != order or swapped != dst.shape or dst.dtype is not src.dtype:
        fail(_TRANSPOSE, instr, f"axes={axes}, src permuted is {swapped}", dst=dst, src=src)
    _check_mode(instr, run, src, priority, dge_mode, oob_mode)
    check_padding(instr, src)
    watch(instr, run, None, src)
    mark(dst, OTHER)
    if run.values:
        dst.array[...] = src.array.transpose(order).copy()
    return issue(run, "dma_transpose", "dma", dst, (src,), dst.size, TRANSPOSE, dge_mode.name, name)


def _check_mode(
    instr: str, run: Run, src: NkiTensor, priority: int | None, mode: Any, oob_mode: Any
) -> None:
    legal = mode in (modes.unknown, modes.hwdge) and oob_mode is oob_modes.error
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
    sources = list(srcs)
    plain = scales is None or all(scale == 1.0 for scale in scales)
    if reduce_op is not OPS["add"] or not plain or not 1 <= len(sources) <= 16:
        detail = f"{len(sources)} sources, reduce_op={reduce_op}, scales={scales}"
        fail(_COMPUTE, instr, detail, dst=dst)
    for tensor in (dst, *sources):
        if type(tensor) is not NkiTensor or tensor.space == PSUM or tensor.size != dst.size:
            fail(_COMPUTE, instr, "place or size of an operand", dst=dst, src=tensor)
    for tensor in sources:
        check_padding(instr, tensor)
    watch(instr, run, dst, *sources)
    mark(dst, OTHER)
    if run.values:
        out = dst.array
        total = dtypes.to_f32(sources[0].array, sources[0].dtype).reshape(out.shape)
        for tensor in sources[1:]:
            total = total + dtypes.to_f32(tensor.array, tensor.dtype).reshape(out.shape)
        dtypes.store_f32(out, total, dst.dtype)
    # A record has room for five sources; the destination's size still counts all bytes moved.
    return issue(run, "dma_compute", "dma", dst, tuple(sources[:5]), dst.size, 0, "none", name)
