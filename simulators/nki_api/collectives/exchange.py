"""What all collectives share: the meeting of the group, moving the data, the log entry.

Core c of a rank talks to core c of the other ranks, each with its own SBUF; tensors in shared HBM
are the rank's, so both cores move the same bytes. Sources are all read before any destination is
written. Does not know any collective: the others pass `compute`.

Source: nki.collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import mark
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.isa.dma import check_padding
from nxd_cp.simulators.nki_api.isa.issue import issue
from nxd_cp.simulators.nki_api.log import Exchange
from nxd_cp.simulators.nki_api.memory import HBM
from nxd_cp.simulators.nki_api.ranks.flights import take_off
from nxd_cp.simulators.nki_api.ranks.scheduler import Place
from nxd_cp.simulators.nki_api.ranks.world import Meeting
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .operands import Operands

Arrays = list[Any]
Compute = Callable[[list[Arrays]], list[Arrays]]


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
    take_off(run.core.flights, instr, given.sources, given.destinations)


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
