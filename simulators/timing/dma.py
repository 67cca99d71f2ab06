"""What one DMA costs: its trigger, its packets on the engines, its bytes against the core's cap.

Does: turn source and destination accesses into a Transfer. Does not: place it in time (machine.py).

A transfer between HBM and SBUF is spread over the engines by partition (engine p // 8), each engine
takes packets of at most `dma_packet_bytes` and never longer than a contiguous run in HBM; a run may
cross partitions. A transfer that stays in HBM is spread evenly.
Source: nki-dma-overview.rst, nki-dma-bandwidth-guide.rst and the constants file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nxd_cp.simulators.nki_api import log as flags

from .access import Access
from .constants import Values
from .cost import Parts

NUM_ENGINES = 16
PARTITIONS_PER_ENGINE = 8
NUM_GROUPS = 4  # engines are tracked in groups of four (32 partitions)


@dataclass(frozen=True)
class Transfer:
    """One DMA. issue: its queue is held; start: trigger to first byte; engine: packets and bytes.

    groups: which groups of engines, and the share of each group's engines, it uses.
    """

    issue: Parts
    start: Parts
    engine: Parts
    core: Parts
    done: Parts
    groups: tuple[int, ...]
    group_share: float
    size_bytes: int
    software: bool
    skipped: bool

    @cached_property
    def issue_ns(self) -> float:
        """Sum of the issue parts."""
        return sum(ns for _, ns in self.issue)

    @cached_property
    def start_ns(self) -> float:
        """Sum of the start parts."""
        return sum(ns for _, ns in self.start)

    @cached_property
    def engine_ns(self) -> float:
        """Sum of the engine parts: how long each of its engines works."""
        return sum(ns for _, ns in self.engine)

    @cached_property
    def core_ns(self) -> float:
        """Its time at the core's bandwidth cap."""
        return sum(ns for _, ns in self.core)

    @cached_property
    def done_ns(self) -> float:
        """Last byte to the consumer's semaphore."""
        return sum(ns for _, ns in self.done)


def transfer(
    generation: str,
    opcode: str,
    detail: str,
    bits: int,
    dst: Access,
    sources: tuple[Access, ...],
    c: Values,
) -> Transfer:
    """The Transfer of one DMA instruction; ValueError for an opcode without a rule."""
    if opcode not in ("dma_copy", "dma_transpose", "dma_compute", "sendrecv"):
        raise ValueError(f"no cost rule for {opcode} on a DMA queue")
    src = max(sources, key=lambda a: a.size_bytes) if sources else dst
    size = max(dst.size_bytes, src.size_bytes)
    chip_side = dst if dst.space != "hbm" else src
    hbm_side = src if src.space == "hbm" else dst
    if chip_side.space == "hbm":
        engines, groups, share = NUM_ENGINES, tuple(range(NUM_GROUPS)), 1.0
    else:
        engines, groups, share = _engines(chip_side)
    per_engine = size / engines
    run = hbm_side.run_bytes if hbm_side.space == "hbm" else chip_side.run_bytes
    run = max(1, min(run, int(per_engine), int(c.dma_packet_bytes)))
    packets = -(-per_engine // run)
    core_rate = c.dma_core_rate
    if opcode == "dma_transpose" or bits & flags.TRANSPOSE:
        both_on_chip = src.space != "hbm" and dst.space != "hbm"
        limit = "dma_transpose_share" if both_on_chip else "dma_transpose_hbm_share"
        parts: Parts = ((limit, size / (core_rate * getattr(c, limit))),)
        cap = parts
    else:
        slow = c.dma_compute_share if opcode == "dma_compute" else 1.0
        parts = _packets(run, packets, per_engine, slow, c)
        cap = (("dma_core_rate", size / (core_rate * slow)),)
    software = generation == "gen2" or detail in ("swdge", "none")
    issue, start = (
        ("dma_software_issue", "dma_software_start")
        if software
        else ("dma_hardware_issue", "dma_hardware_start")
    )
    skipped = bool(bits & flags.SKIPPED)
    return Transfer(
        issue=((issue, getattr(c, issue)),),
        start=((start, getattr(c, start)),),
        engine=() if skipped else parts,
        core=() if skipped else cap,
        done=(("dma_done", c.dma_done),),
        groups=groups,
        group_share=share,
        size_bytes=0 if skipped else size,
        software=software,
        skipped=skipped,
    )


def _packets(run: int, packets: float, size: float, slow: float, c: Values) -> Parts:
    """What an engine's packets of `run` bytes cost, `size` bytes together; short ones cost less.

    Two lines through measured packets, of which the lower one counts.
    """
    usual = c.dma_packet + run / c.dma_engine_rate
    if c.dma_short_packet + run / c.dma_short_rate < usual:
        return (
            ("dma_short_packet", packets * c.dma_short_packet),
            ("dma_short_rate", size / (c.dma_short_rate * slow)),
        )
    return (
        ("dma_packet", packets * c.dma_packet),
        ("dma_engine_rate", size / (c.dma_engine_rate * slow)),
    )


def _engines(side: Access) -> tuple[int, tuple[int, ...], float]:
    """(engines, groups of four, share of each group) that serve an on-chip access."""
    first, last = side.first_partition, side.first_partition + side.partitions - 1
    low, high = first // PARTITIONS_PER_ENGINE, last // PARTITIONS_PER_ENGINE
    engines = max(1, high - low + 1)
    per_group = NUM_ENGINES // NUM_GROUPS
    groups = tuple(range(low // per_group, high // per_group + 1))
    return engines, groups, engines / (len(groups) * per_group)
