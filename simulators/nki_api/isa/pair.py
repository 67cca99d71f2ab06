"""The two cores of a Logical NeuronCore: sendrecv and core_barrier.

Both cores make the call; the last to arrive moves the data of both, or lets both go on.

Source: nki.isa.sendrecv, nki.isa.core_barrier.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api.checks import check_tile, destination, in_sbuf
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.log import Exchange
from nxd_cp.simulators.nki_api.memory import MemoryRegion
from nxd_cp.simulators.nki_api.ranks.world import Meeting
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .dma import check_padding
from .enums import dma_engine as dma_engines
from .enums import engine as engines
from .generation import need
from .issue import NkiInstruction, issue
from .members import member

_TWO_CORES = documented(
    "pair.cores",
    "nki.isa.sendrecv, nki.isa.core_barrier",
    "the kernel runs on two cores; ranks are 0 and 1, cores=(0, 1), and what one core sends to the "
    "other the other receives from it",
)
_ALONE = inferred(
    "pair.alone",
    "nki.isa.core_barrier",
    "core_barrier is for two cores; on one core it does nothing",
)
_TILES = documented(
    "sendrecv.tiles", "nki.isa.sendrecv", "src and dst in SBUF have one dtype and one shape"
)
_GPSIMD = documented(
    "sendrecv.gpsimd_dma",
    "nki.isa.sendrecv",
    "gpsimd_dma takes at most 1024, 512 or 256 bytes per partition of 32, 16 or 8-bit types",
)
_BARRIER_DATA = inferred(
    "core_barrier.data",
    "nki.isa.core_barrier; nki-library@d2ad3a5 (bwmm_shard_on_I.py) gives a tile in SBUF",
    "data is a tensor in shared HBM",
)


def sendrecv(
    src: Any,
    dst: Any,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: Any = dma_engines.dma,
    name: str | None = None,
) -> NkiInstruction:
    """This core's src to the dst of core send_to_rank, and recv_from_rank's src to ours."""
    instr = "nki.isa.sendrecv"
    run = current(instr)
    need(run, instr, 3)
    in_sbuf(instr, src=src, dst=dst)
    if src.dtype is not dst.dtype or src.shape != dst.shape:
        fail(_TILES, instr, "src and dst differ", src=src, dst=dst)
    ranks = (send_to_rank, recv_from_rank)
    if run.num_programs != 2 or any(rank not in (0, 1) for rank in ranks):
        detail = f"send_to_rank={send_to_rank}, recv_from_rank={recv_from_rank}"
        fail(_TWO_CORES, instr, f"{detail} on {run.num_programs} core(s)", src=src)
    dma_engine = member(instr, dma_engines, dma_engine)
    row_bytes = src.size // src.shape[0] * src.dtype.itemsize
    if dma_engine is dma_engines.gpsimd_dma and row_bytes > 256 * src.dtype.itemsize:
        fail(_GPSIMD, instr, f"{row_bytes} bytes per partition", src=src)
    check_tile(instr, "src", src)
    check_padding(instr, src)
    terms = {
        "pipe_id": pipe_id,
        "shape": src.shape,
        "dtype": src.dtype,
        "dma_engine": dma_engine.name,
    }
    payload = (src, dst, send_to_rank, recv_from_rank)
    members = run.world.cores((run.place.rank,))
    meeting = run.world.meet(run, instr, members, terms, payload, _swap)
    trigger = "gpsimd" if dma_engine is dma_engines.gpsimd_dma else "dma"
    detail = f"pipe{pipe_id}"
    elements = dst.size // dst.shape[0]
    made = issue(run, "sendrecv", trigger, dst, (src,), elements, detail=detail, name=name)
    if run.log is not None:
        _log_exchange(run, "sendrecv", meeting, ranks, (src,), (dst,))
    return made


def _swap(meeting: Meeting) -> None:
    """Move the tiles of both cores."""
    arrivals = {place.core: arrival for place, arrival in meeting.arrivals.items()}
    sent = {}
    for core, arrival in arrivals.items():
        src, _, send_to, _ = arrival.payload
        if arrivals[send_to].payload[3] != core:
            receives = f"core {send_to} receives from core {arrivals[send_to].payload[3]}"
            fail(_TWO_CORES, meeting.instr, f"core {core} sends to core {send_to}, but {receives}")
        sent[send_to] = src.array.copy() if arrival.run.values else None
    for core, arrival in arrivals.items():
        out = destination(meeting.instr, "dst", arrival.payload[1])
        if sent[core] is not None:
            out[...] = sent[core]


def core_barrier(
    data: Any, cores: Any, engine: Any = engines.gpsimd, name: str | None = None
) -> NkiInstruction:
    """No core goes on before both have come here; orders what they do to `data`."""
    instr = "nki.isa.core_barrier"
    run = current(instr)
    need(run, instr, 3)
    if not isinstance(data, NkiTensor):
        fail(_BARRIER_DATA, instr, "data is not a tensor", data=data)
    if data.buffer is not MemoryRegion.shared_hbm:
        broken(_BARRIER_DATA, instr, f"data is in {data.buffer.value}", data=data)
    given = tuple(cores) if isinstance(cores, (tuple, list)) else (cores,)
    if run.num_programs == 1 and given == (0,):
        broken(_ALONE, instr, "the kernel runs on one core", data=data)
        return issue(run, "core_barrier", engine.name, None, (data,), 0, name=name)
    if run.num_programs != 2 or given != (0, 1):
        fail(_TWO_CORES, instr, f"cores={cores} on {run.num_programs} core(s)", data=data)
    place = data.storage.name or f"{data.shape} {data.dtype}"
    terms = {"engine": engine.name, "data": place}
    members = run.world.cores((run.place.rank,))
    meeting = run.world.meet(run, instr, members, terms, data, _order)
    made = issue(run, "core_barrier", engine.name, None, (data,), 0, name=name)
    if run.log is not None:
        other = (1 - run.place.core,)
        _log_exchange(run, "core_barrier", meeting, other * 2, (), ())
    return made


def _order(meeting: Meeting) -> None:
    """What both cores did to the tensor is over."""
    for arrival in meeting.arrivals.values():
        watch = arrival.payload.storage.watch
        if watch is not None:
            watch.met()


def _log_exchange(
    run: Run,
    kind: str,
    meeting: Meeting,
    ranks: tuple[int, ...],
    sources: tuple[NkiTensor, ...],
    destinations: tuple[NkiTensor, ...],
) -> None:
    log, rank = run.log, run.place.rank
    assert log is not None, "only called when there is a log"
    num_bytes = sum(t.size * t.dtype.itemsize for t in sources)
    log.exchanges.append(
        Exchange(
            seq=len(log) - 1,
            meeting=meeting.number,
            kind=kind,
            members=tuple((p.rank, p.core) for p in meeting.members),
            sends_to=((rank, ranks[0]),),
            receives_from=((rank, ranks[1]),),
            sources=tuple(log.view(t) for t in sources),
            destinations=tuple(log.view(t) for t in destinations),
            bytes_sent=num_bytes,
            bytes_received=num_bytes,
            group=(rank,),
            channels=(),
        )
    )
