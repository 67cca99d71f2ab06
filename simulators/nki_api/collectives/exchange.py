"""What all collectives share: operand checks, the meeting of the group, and the log entry.

Core c of a rank talks to core c of the other ranks, each with its own SBUF; tensors in shared HBM
are the rank's, so both cores move the same bytes. Sources are all read before any destination is
written. Does not know any collective: the others pass `compute`.

Source: nki.collectives; aws-neuron/nki-library@d2ad3a5, test_collectives.py (inputs, names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import mark
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.isa.dma import check_padding
from nxd_cp.simulators.nki_api.isa.issue import issue
from nxd_cp.simulators.nki_api.log import Exchange
from nxd_cp.simulators.nki_api.memory import HBM, PSUM, SBUF
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.ranks.scheduler import Place
from nxd_cp.simulators.nki_api.ranks.world import Meeting
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

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
    "no destination of a collective overlaps a source of it",
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

Arrays = list[Any]
Compute = Callable[[list[Arrays]], list[Arrays]]


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
    for src in srcs:
        for dst in dsts:
            if dst.storage is src.storage and _bounds_overlap(src, dst):
                broken(_ALIAS, instr, "a destination overlaps a source", src=src, dst=dst)
    return Operands(tuple(srcs), tuple(dsts))


def one(instr: str, tensors: Any) -> Any:
    """`tensors`, which must be a list of one."""
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 1:
        fail(_PLACES, instr, "expected a list of exactly one tensor", given=tensors)
    return tensors


def _bounds_overlap(a: NkiTensor, b: NkiTensor) -> bool:
    (p0, p1, b0, b1), (q0, q1, c0, c1) = a.rect, b.rect
    return p0 < q1 and q0 < p1 and b0 < c1 and c0 < b1


def require_sizes(instr: str, src: NkiTensor, dst: NkiTensor, wanted: tuple[int, ...]) -> None:
    """dst must have src's dtype and the shape `wanted`."""
    if dst.dtype is not src.dtype or dst.shape != wanted:
        fail(SIZES, instr, f"expected a dst of {wanted} {src.dtype}", src=src, dst=dst)


def check_priority(run: Run, instr: str, priority: Any) -> None:
    """DMA quality of service exists on gen4."""
    if priority is not None and not (run.chip.dma_priority and priority in range(4)):
        fail(_PRIORITY, instr, f"priority={priority} on {run.chip.generation}")


def reduction(instr: str, op: Any) -> Callable[[Any, Any], Any]:
    """The fp32 function of a reduction operator."""
    if op not in (OPS["add"], OPS["minimum"], OPS["maximum"]):
        fail(_OP, instr, f"op={op!r}")
    return lambda a, b: op.binary(a, b)


def exchange(
    run: Run,
    instr: str,
    given: Operands,
    group: tuple[int, ...],
    act: Callable[[Meeting], None],
    *,
    terms: dict[str, Any],
    rings: Sequence[tuple[int, ...]] = (),
    volume: float = 1.0,
) -> None:
    """Meet the group, move the data, log.

    act: what the last to arrive does for all, mostly `moving(group, compute)`.
    rings: the order of the ranks of each channel, for the collectives that go round rings.
    volume: bytes sent over bytes of the sources.
    """
    shapes = [(t.shape, str(t.dtype)) for t in (*given.sources, *given.destinations)]
    spaces = "HBM" if given.sources[0].space == HBM else "SBUF"
    agreed = {"group": group, "memory": spaces, "operands": shapes, **terms}
    meeting = run.world.meet(run, instr, run.world.cores(group), agreed, given, act)
    kind = instr.rpartition(".")[2]
    first, size = given.destinations[0], max(t.size for t in given.destinations)
    issue(run, kind, "cc", first, given.sources[:5], size, detail=str(len(group)))
    if run.log is not None:
        _log_exchange(run, kind, meeting, given, group, rings, volume)


def planes(meeting: Meeting, group: tuple[int, ...]) -> Iterator[tuple[list[Operands], bool]]:
    """For each core number, the operands of the group's ranks in order, and whether to compute.

    Whether sources were written is known only now: the other core of a rank may write a part.
    """
    _watch(meeting)
    for core in range(meeting.world.lnc):
        plane = [meeting.arrivals[Place(rank, core)] for rank in group]
        for arrival in plane:
            for src in arrival.payload.sources:
                check_padding(meeting.instr, src)
        yield [arrival.payload for arrival in plane], plane[0].run.values


def _watch(meeting: Meeting) -> None:
    """A collective of both cores orders their accesses to its tensors in shared HBM."""
    for place, arrival in meeting.arrivals.items():
        for src in arrival.payload.sources:
            if src.storage.watch is not None:
                src.storage.watch.send(place.core, meeting.instr, src)
    for arrival in meeting.arrivals.values():
        for tensor in (*arrival.payload.sources, *arrival.payload.destinations):
            if tensor.storage.watch is not None:
                tensor.storage.watch.met()


def moving(group: tuple[int, ...], compute: Compute) -> Callable[[Meeting], None]:
    """Read all sources, then write all destinations.

    compute: from every member's source arrays, in group order, every member's new destinations.
    """

    def act(meeting: Meeting) -> None:
        results: list[tuple[Operands, Arrays | None]] = []
        for plane, values in planes(meeting, group):
            outputs: list[Arrays | None] = [None] * len(plane)
            if values:
                outputs[:] = compute([[t.array.copy() for t in o.sources] for o in plane])
            results += zip(plane, outputs, strict=True)
        for operand, arrays in results:
            for i, dst in enumerate(operand.destinations):
                mark(dst, OTHER)
                if arrays is not None:
                    _store(dst, arrays[i])

    return act


def _store(dst: NkiTensor, values: Any) -> None:
    """Equal types move bits; fp32 sums are rounded to dst."""
    if values.dtype == dst.dtype.np_dtype:
        dst.array[...] = values.reshape(dst.shape)
    else:
        dtypes.store_f32(dst.array, values.reshape(dst.shape), dst.dtype)


def _log_exchange(
    run: Run,
    kind: str,
    meeting: Meeting,
    given: Operands,
    group: tuple[int, ...],
    rings: Sequence[tuple[int, ...]],
    volume: float,
) -> None:
    log, place = run.log, run.place
    assert log is not None, "only called when there is a log"
    others = [rank for rank in group if rank != place.rank]
    after, before = others, others
    if rings:
        steps = [(order, order.index(place.rank)) for order in rings]
        after = [order[(at + 1) % len(order)] for order, at in steps]
        before = [order[at - 1] for order, at in steps]
    sent = sum(t.size * t.dtype.itemsize for t in given.sources) * volume
    log.exchanges.append(
        Exchange(
            seq=len(log) - 1,
            meeting=meeting.number,
            kind=kind,
            members=tuple((p.rank, p.core) for p in meeting.members),
            sends_to=tuple((rank, place.core) for rank in after),
            receives_from=tuple((rank, place.core) for rank in before),
            sources=tuple(log.view(t) for t in given.sources),
            destinations=tuple(log.view(t) for t in given.destinations),
            bytes_sent=round(sent),
            bytes_received=round(sent),
            group=group,
            channels=tuple(range(len(rings))),
        )
    )
