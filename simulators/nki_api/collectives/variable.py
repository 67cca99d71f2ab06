"""Collectives with run-time sizes: all_gather_v and all_to_all_v.

Tensors are flat rows of elements; counts and displacements come from a uint32 metadata tensor of
rows send_counts, send_displs, recv_counts (written by the call) and recv_displs. In shape-only
mode the whole dst counts as written.

Source: nki.collectives.all_gather_v, all_to_all_v. Letters: n ranks, metadata[row, rank].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import mark
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.isa.dma import check_padding
from nxd_cp.simulators.nki_api.memory import HBM, SBUF
from nxd_cp.simulators.nki_api.ranks.world import Meeting
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .exchange import exchange, planes
from .operands import SIZES, Operands, begin, one, operands

_METADATA = documented(
    "collective_v.metadata",
    "nki.collectives.all_to_all_v",
    "metadata is a uint32 tensor of [3 or 4, n] in HBM or [1, 3 or 4, n] in SBUF (4 rows with "
    "has_rdispls), and every chunk lies inside src and its part of dst",
)
_LIMITS = documented(
    "collective_v.limits",
    "nki.collectives.all_gather_v, all_to_all_v",
    "all_gather_v: two cores per rank, 4 ranks per group, no has_rdispls; all_to_all_v on gen4: "
    "two cores per rank, groups of successive ranks in fours; has_rdispls on gen4 only",
)


def all_gather_v(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    metadata_tensor: Any,
    recv_counts_known: bool = False,
    has_rdispls: bool = False,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """Slot s of every dst = the chunk of the s-th rank's src that its metadata names."""
    instr = "nki.collectives.all_gather_v"
    run, group = begin(instr, name, replica_group, priority)
    if run.num_programs != 2 or len(group) != 4 or has_rdispls:
        detail = f"{run.num_programs} core(s), {len(group)} ranks, has_rdispls={has_rdispls}"
        fail(_LIMITS, instr, detail)
    _exchange(run, instr, srcs, dsts, group, metadata_tensor, recv_counts_known, False, True)


def all_to_all_v(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    metadata_tensor: Any,
    recv_counts_known: bool = False,
    has_rdispls: bool = False,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """Part s of every dst = the chunk that the s-th rank's metadata names for this rank."""
    instr = "nki.collectives.all_to_all_v"
    run, group = begin(instr, name, replica_group, priority)
    switch = run.chip.number >= 4
    successive = group == tuple(range(group[0], group[0] + len(group)))
    whole = run.num_programs == 2 and len(group) % 4 == 0 and successive
    if (has_rdispls and not switch) or (switch and not whole):
        detail = f"{run.num_programs} core(s), group {group}, has_rdispls={has_rdispls}"
        fail(_LIMITS, instr, f"{detail} on {run.chip.generation}")
    _exchange(run, instr, srcs, dsts, group, metadata_tensor, recv_counts_known, has_rdispls, False)


def _exchange(
    run: Run,
    instr: str,
    srcs: Any,
    dsts: Any,
    group: tuple[int, ...],
    metadata: Any,
    counts_known: bool,
    has_rdispls: bool,
    same_chunk: bool,
) -> None:
    """Both collectives: they differ in whether a rank sends everyone the same chunk."""
    tensors = operands(run, instr, one(instr, srcs), one(instr, dsts), hbm_only=True)
    src, dst = tensors.sources[0], tensors.destinations[0]
    n, rows = len(group), 4 if has_rdispls else 3
    if dst.dtype is not src.dtype or dst.size % n:
        fail(SIZES, instr, f"dtypes, or {dst.size} elements for {n} ranks", src=src, dst=dst)
    _check_metadata(instr, metadata, rows, n)
    given = Operands(tensors.sources, tensors.destinations, metadata)

    def act(meeting: Meeting) -> None:
        for plane, values in planes(meeting, group):
            if values:
                _deliver(instr, plane, n, same_chunk, counts_known)
            else:
                for member in plane:
                    mark(member.destinations[0], OTHER)

    terms = {"recv_counts_known": counts_known, "has_rdispls": has_rdispls}
    # Counts are run-time values: the log has the whole source as an upper bound.
    exchange(run, instr, given, group, act, terms=terms)


def _check_metadata(instr: str, metadata: Any, rows: int, n: int) -> None:
    shapes = {HBM: (rows, n), SBUF: (1, rows, n)}
    if type(metadata) is not NkiTensor or metadata.shape != shapes.get(metadata.space):
        fail(_METADATA, instr, f"expected {rows} rows for {n} ranks", metadata=metadata)
    if metadata.dtype is not dtypes.uint32:
        fail(_METADATA, instr, f"dtype {metadata.dtype}", metadata=metadata)
    check_padding(instr, metadata[..., :2, :])


def _deliver(
    instr: str, plane: list[Operands], n: int, same_chunk: bool, counts_known: bool
) -> None:
    """Every chunk to its place; then the received counts."""
    tables = [_table(member.metadata) for member in plane]
    chunks = [
        _chunks(instr, member, t, same_chunk) for member, t in zip(plane, tables, strict=True)
    ]
    for i, (member, table) in enumerate(zip(plane, tables, strict=True)):
        dst, metadata = member.destinations[0], member.metadata
        slot = dst.size // n
        for s in range(n):
            chunk = chunks[s][i]
            at = int(table[3, s]) if len(table) > 3 else s * slot
            if at + chunk.size > dst.size or (len(table) == 3 and chunk.size > slot):
                fail(_METADATA, instr, f"{chunk.size} elements at {at} of dst", dst=dst)
            if chunk.size:
                piece = dst.reshape((dst.size,))[at : at + chunk.size]
                mark(piece, OTHER)
                piece.array[...] = chunk
        if not counts_known:
            assert metadata is not None, "checked before the meeting"
            row = metadata[..., 2:3, :]
            mark(row, OTHER)
            row.array[...] = np.array([chunks[s][i].size for s in range(n)], np.uint32)


def _table(metadata: Any) -> Any:
    return metadata.array.reshape(metadata.shape[-2:]).astype(np.int64)


def _chunks(instr: str, member: Operands, table: Any, same_chunk: bool) -> list[Any]:
    """What one member sends to each rank."""
    src = member.sources[0]
    flat = src.array.reshape(-1)
    found = []
    for rank in range(table.shape[1]):
        column = 0 if same_chunk else rank
        count, at = int(table[0, column]), int(table[1, column])
        if at + count > flat.size:
            fail(_METADATA, instr, f"{count} elements from {at} of src", src=src)
        found.append(flat[at : at + count].copy())
    return found
