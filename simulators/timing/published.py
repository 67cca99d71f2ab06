"""Published timings, one figure a row, and what this model says for those it can run.

Does: read data/published.csv and predict each row that has an instruction stream (streams/) or a
public kernel (catalog.py). Does not: judge (validation.py). Rows are fit (constants come from
them), or score (compared only; no constant is fitted on them); fit-suite and score-suite are the
same for expected times in a vendor's own test list, read as picoseconds.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from .catalog import Source, source, why_not
from .clones import NotRun, run
from .estimate import Estimate, estimate, estimate_cores, matmul_flops
from .profile import hbm_bytes
from .streams.primitives import Primitive, primitive

DATA = Path(__file__).parent / "data" / "published.csv"
TIMES = (
    "latency",
    "total",
    "nc_latency",
    "kernel time",
    "steady standalone kernel",
    "measured",
    "TpbSgCyclesSum reference, read as ps",
)
NS_PER = {"ns": 1.0, "us": 1e3, "ms": 1e6, "%": 1.0, "GB/s": 1.0, "Gcol/s": 1.0}
TRN2_HBM_PER_CORE = 3000.0 / 8  # B/ns, trainium2_arch.rst


@dataclass(frozen=True)
class Row:
    """One published figure. value is in `unit`; use is fit or score."""

    group: str
    kernel: str
    shape: str
    dtype: str
    instance: str
    metric: str
    value: float
    unit: str
    stat: str
    source: str
    use: str

    @property
    def generation(self) -> str:
        """gen2 or gen3, from the instance."""
        return "gen2" if self.instance.startswith(("trn1", "inf2")) else "gen3"

    @property
    def name(self) -> str:
        """Kernel, shape and metric in one line."""
        return f"{self.kernel} {self.shape} {self.dtype}: {self.metric}".replace("  ", " ")


@dataclass(frozen=True)
class Prediction:
    """The model's figure for a row, in the row's unit, and the expected total in ns."""

    value: float
    total_ns: float
    guess_share: float | None  # of the expected time; None for primitives
    kind: Literal["kernel", "primitive", "small primitive"]
    ran: str = "stream"  # or "public kernel", or why that did not run
    band: tuple[float, float] | None = None  # bound and pessimistic, where the row is a time


@lru_cache(maxsize=1)
def rows() -> tuple[Row, ...]:
    """All rows of the data file."""
    with DATA.open(encoding="utf-8", newline="") as file:
        return tuple(
            Row(
                group=r["group"],
                kernel=r["kernel"],
                shape=r["shape"],
                dtype=r["dtype"],
                instance=r["instance"],
                metric=r["metric"],
                value=float(r["value"]),
                unit=r["unit"],
                stat=r["stat"],
                source=r["source"],
                use=r["use"],
            )
            for r in csv.DictReader(file)
        )


def not_a_kernel(row: Row) -> bool:
    """Rows that time a framework, not one kernel: nothing here could predict them."""
    return "PyTorch compiled" in row.kernel or row.metric == "sync call"


def predict(row: Row, clones: Path | None = None) -> Prediction | str:
    """The model's figure, or why there is none.

    clones: folder with clones of public repositories; a kernel found there is run as it is.
    """
    single = primitive(row.group, row.kernel, row.shape, row.metric)
    if single is not None:
        return _single(row, single)
    found = source(row)
    if found is None:
        return why_not(row)
    times, ran = _estimate(found, row.generation, clones)
    if times is None:
        return ran
    value = _metric(row, times)
    if value is None:
        return f"no rule for {row.metric}"
    band = None
    if row.metric in TIMES:
        band = times.bound_ns / NS_PER[row.unit], times.pessimistic_ns / NS_PER[row.unit]
    return Prediction(value, times.expected_ns, times.guess_share, "kernel", ran, band)


def _single(row: Row, single: Primitive) -> Prediction:
    value = single.value_ns if single.bytes == 0 else single.bytes / single.value_ns
    if single.bytes == 0:
        value /= NS_PER[row.unit]
    kind: Literal["primitive", "small primitive"] = (
        "primitive" if single.elements >= 128 else "small primitive"
    )
    return Prediction(value, single.value_ns, None, kind)


@lru_cache(maxsize=4)
def _estimate(found: Source, generation: str, clones: Path | None) -> tuple[Estimate | None, str]:
    """The estimate and what ran; None and why when neither the public kernel nor a stream runs."""
    ran = "stream"
    if found.why_stream:
        ran = f"stream; {found.why_stream}"
    elif found.kernel is not None:
        try:
            if clones is None:
                raise NotRun("its public kernel needs clones")
            log = run(found.kernel, clones, generation)
            cores = estimate_cores(log, generation, found.options).values()
            return max(cores, key=lambda times: times.expected_ns), "public kernel"
        except NotRun as error:
            ran = f"stream; {error}" if clones is not None else ran
            if found.stream is None:
                return None, str(error)
    return estimate(found.build(), generation, found.options), ran


def _metric(row: Row, times: Estimate) -> float | None:
    """What the row measures, in its unit."""
    engines = {"PE active": "tensor", "VectorE active": "vector", "ScalarE active": "scalar"}
    if row.metric in TIMES:
        return times.expected_ns / NS_PER[row.unit]
    if row.metric in engines:
        return active_ns(times, engines[row.metric]) / NS_PER[row.unit]
    if row.metric == "DMA active":
        return dma_active_ns(times) / NS_PER[row.unit]
    if row.metric == "HFU":
        peak = 91.75e3 if row.generation == "gen2" else 78.64e3
        return 100 * matmul_flops(times.timeline.program) / (peak * times.expected_ns)
    if row.metric == "MBU":
        return 100 * sum(hbm_bytes(times)) / times.expected_ns / TRN2_HBM_PER_CORE
    return None


def active_ns(times: Estimate, engine: str) -> float:
    """Time during which an engine has an instruction whose result is not out: a profiler's view."""
    line = times.timeline
    return _covered(
        (line.start[i], line.end[i])
        for i, queue in enumerate(line.program.queues)
        if queue == engine
    )


def dma_active_ns(times: Estimate) -> float:
    """Time during which at least one DMA moves data."""
    return _covered(times.timeline.transfer.values())


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    total, until = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
