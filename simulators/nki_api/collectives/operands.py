"""The tensors of a collective, and what must hold of them whatever the collective.

Source: nki.collectives; aws-neuron/nki-library@d2ad3a5, test_collectives.py (inputs, names).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.memory import HBM, PSUM, SBUF
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current, note_name
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .group import own_group

_PLACES = documented(
    "collective.operands",
    "nki.collectives",
    "srcs and dsts are equally long lists of tensors, all in HBM or all in SBUF (2-D, one tensor); "
    "some collectives take HBM or a single tensor only",
)
_INPUTS = documented(
    "collective.io_tensor",
    "nki-samples, allgather_matmul_ring tutorial",
    "a collective neither reads nor writes the kernel's inputs; copy them first",
)
_NAMES = inferred(
    "collective.name",
    "aws-neuron/nki-library@d2ad3a5, test_collectives.py (NCC_IBIR440)",
    "a collective's tensors in HBM have a name",
)
_ALIAS = inferred(
    "collective.alias",
    "nki-samples, allgather_matmul_ring tutorial",
    "no destination of a collective overlaps a source of it, or another destination",
)
SIZES = documented(
    "collective.sizes",
    "nki.collectives",
    "sources and destinations have one dtype, and shapes that fit the collective and its group",
)
_OP = documented("collective.op", "nki.collectives", "op is nl.add, nl.minimum or nl.maximum")
_PRIORITY = documented(
    "collective.priority", "nki.collectives", "priority is 0 to 3, and gen4 only"
)


@dataclass(frozen=True)
class Operands:
    """One member's tensors, channel by channel or tensor by tensor."""

    sources: tuple[NkiTensor, ...]
    destinations: tuple[NkiTensor, ...]
    metadata: NkiTensor | None = None


def operands(
    run: Run, instr: str, srcs: Any, dsts: Any, *, hbm_only: bool = False, channels: bool = False
) -> Operands:
    """The checked tensors of a collective; `channels`: one tensor per channel, also in SBUF."""
    lists = isinstance(srcs, (list, tuple)) and isinstance(dsts, (list, tuple))
    if not lists or not srcs or len(srcs) % len(dsts or [1]) or not dsts:
        fail(_PLACES, instr, "srcs and dsts must be lists of tensors", srcs=srcs, dsts=dsts)
    tensors = [*srcs, *dsts]
    spaces = {t.space if type(t) is NkiTensor else None for t in tensors}
    legal = len(spaces) == 1 and spaces <= ({HBM} if hbm_only else {HBM, SBUF})
    if not legal or PSUM in spaces or (len(dsts) > 1 and spaces == {SBUF} and not channels):
        shown = {f"tensor {i}": t for i, t in enumerate(tensors[:6])}
        fail(_PLACES, instr, f"{len(srcs)} sources, {len(dsts)} destinations", **shown)
    for tensor in tensors:
        if tensor.space == SBUF and tensor.ndim != 2:
            fail(_PLACES, instr, f"an SBUF tensor with {tensor.ndim} dims", tensor=tensor)
        if tensor.storage.io:
            fail(_INPUTS, instr, "a kernel input as operand", tensor=tensor)
        if tensor.space == HBM and not tensor.name:
            broken(_NAMES, instr, "a tensor without a name", tensor=tensor)
        tensor.storage.collective = True
    for i, dst in enumerate(dsts):
        for src in srcs:
            if _overlap(src, dst):
                broken(_ALIAS, instr, "a destination overlaps a source", src=src, dst=dst)
        if any(_overlap(dst, other) for other in dsts[:i]):
            broken(_ALIAS, instr, "a destination overlaps another one", dst=dst)
    return Operands(tuple(srcs), tuple(dsts))


def one(instr: str, tensors: Any) -> Any:
    """`tensors`, which must be a list of one."""
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 1:
        fail(_PLACES, instr, "expected a list of exactly one tensor", given=tensors)
    return tensors


def _overlap(a: NkiTensor, b: NkiTensor) -> bool:
    if a.storage is not b.storage:
        return False
    (p0, p1, b0, b1), (q0, q1, c0, c1) = a.rect, b.rect
    return p0 < q1 and q0 < p1 and b0 < c1 and c0 < b1


def require_sizes(instr: str, src: NkiTensor, dst: NkiTensor, wanted: tuple[int, ...]) -> None:
    """dst must have src's dtype and the shape `wanted`."""
    if dst.dtype is not src.dtype or dst.shape != wanted:
        fail(SIZES, instr, f"expected a dst of {wanted} {src.dtype}", src=src, dst=dst)


def begin(
    instr: str, name: str | None, replica_group: Any, priority: Any
) -> tuple[Run, tuple[int, ...]]:
    """The run, and the ranks of the caller's group, in order."""
    note_name(instr, name)
    run = current(instr)
    check_priority(run, instr, priority)
    return run, own_group(run, instr, replica_group)


def check_priority(run: Run, instr: str, priority: Any) -> None:
    """DMA quality of service exists on gen4."""
    if priority is not None and not (run.chip.dma_priority and priority in range(4)):
        fail(_PRIORITY, instr, f"priority={priority} on {run.chip.generation}")


def reduction(instr: str, op: Any) -> Callable[[Any, Any], Any]:
    """The fp32 function of a reduction operator."""
    if op not in (OPS["add"], OPS["minimum"], OPS["maximum"]):
        fail(_OP, instr, f"op={op!r}")
    return lambda a, b: op.binary(a, b)
