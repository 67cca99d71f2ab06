"""Collectives in flight over placed memory: bytes used under another name before the end is known.

A collective runs beside the engines. The compiler waits for it before an instruction that uses its
result, or overwrites its source, under the same tensor. A tensor placed over the same bytes is
another tensor; that the compiler orders it too is written nowhere, so using it is warned about
until the collective's own tensor has been used.

Source: nki.collectives; nki.language.ndarray (address).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nxd_cp.simulators.nki_api.errors import broken, line_text, user_place
from nxd_cp.simulators.nki_api.region import Rect, overlap
from nxd_cp.simulators.nki_api.rules import inferred
from nxd_cp.simulators.nki_api.tensor import NkiTensor

_IN_FLIGHT = inferred(
    "race.in_flight",
    "our reading of nki.collectives and nki.language.ndarray (address)",
    "memory of a collective is not used under another name before its own result was used",
)


@dataclass(frozen=True)
class Flight:
    """A collective that may still run: its placed operands, and where it was started."""

    instr: str
    line: tuple[str, int]
    sources: dict[int, Rect]  # by storage number
    destinations: dict[int, Rect]


def _placed(tensors: Iterable[NkiTensor]) -> dict[int, Rect]:
    return {t.storage.number: t.rect for t in tensors if t.storage.own is not None}


def take_off(
    flights: list[Flight],
    instr: str,
    sources: Iterable[NkiTensor],
    destinations: Iterable[NkiTensor],
) -> None:
    """A collective starts; only placed tensors can be used under another name."""
    made = Flight(instr, user_place(), _placed(sources), _placed(destinations))
    if made.sources or made.destinations:
        flights.append(made)


def observe(flights: list[Flight], instr: str, dst: Any, sources: Iterable[Any]) -> None:
    """An instruction runs: it ends flights whose tensors it waits for, or uses their bytes."""
    read = [t for t in sources if isinstance(t, NkiTensor) and t.storage.own is not None]
    write = [dst] if isinstance(dst, NkiTensor) and dst.storage.own is not None else []
    for flight in list(flights):
        ends = any(t.storage.number in flight.destinations for t in (*read, *write))
        ends = ends or any(t.storage.number in flight.sources for t in write)
        if ends:
            flights.remove(flight)
            continue
        for tensors, rects in (
            (write, [*flight.sources.values(), *flight.destinations.values()]),
            (read, flight.destinations.values()),
        ):
            for tensor in tensors:
                if any(overlap(tensor.rect, rect) for rect in rects):
                    where = f"{flight.instr} started at\n    {line_text(*flight.line)}\n    "
                    broken(_IN_FLIGHT, instr, f"{where}and may use these bytes", tensor=tensor)
