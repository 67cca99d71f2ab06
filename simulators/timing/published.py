"""Published timings, one figure a row, and what this model says for those it can run.

Does: read data/published.csv and predict each row that has an instruction stream (streams/), with
the reason when it has none. Does not: judge (validation.py). Rows are fit (constants come from
them), or score (compared only; no constant is fitted on them).

Rows measured with compilers before dynamic descriptor generation ("old" namespaces, and tutorials
whose figures date from 2024) are timed with one DMA queue per source line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from nxd_cp.simulators.nki_api.log import Log

from .clones import Kernel, NotRun, mamba_kernel, matmul_kernel, run
from .estimate import Estimate, estimate, matmul_flops
from .profile import hbm_bytes
from .program import Options
from .streams.attention import attention
from .streams.attention_steps import attention_step
from .streams.conv import depthwise_conv
from .streams.mamba import mamba
from .streams.matmul import matmul
from .streams.nkibench import nkibench
from .streams.primitives import Primitive, primitive

DATA = Path(__file__).parent / "data" / "published.csv"
NS_PER = {"ns": 1.0, "us": 1e3, "ms": 1e6, "%": 1.0, "GB/s": 1.0, "Gcol/s": 1.0}
ATTENTION_STEPS = tuple(f"attention trace step {step}" for step in (0, 7, 8))
GEMM_STEPS = {"gemm trace step 1": "group 1x2", "gemm trace step 3": "group 4x2"}
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


def predict(row: Row, clones: Path | None = None) -> Prediction | None:
    """The model's figure, or None when the row's kernel has no stream.

    clones: folder with clones of public repositories; a kernel found there is run as it is.
    """
    single = primitive(row.group, row.kernel, row.shape, row.metric)
    if single is not None:
        return _single(row, single)
    found = _stream(row)
    if found is None:
        return None
    key, options = found
    times, ran = _estimate(key, row.generation, options, clones)
    value = _metric(row, times)
    if value is None:
        return None
    return Prediction(value, times.expected_ns, times.guess_share, "kernel", ran)


def _single(row: Row, single: Primitive) -> Prediction:
    value = single.value_ns if single.bytes == 0 else single.bytes / single.value_ns
    if single.bytes == 0:
        value /= NS_PER[row.unit]
    kind: Literal["primitive", "small primitive"] = (
        "primitive" if single.elements >= 128 else "small primitive"
    )
    return Prediction(value, single.value_ns, None, kind)


def _stream(row: Row) -> tuple[tuple[object, ...], Options] | None:
    """(what to build, options) of a row's stream."""
    by_line = Options(dma_queues="line")
    if row.group in ("A1", "A2"):
        names = {
            "tiled": "tiled",
            "hoist": "hoist",
            "block": "block",
            "full": "full",
            "optimised": "full",
        }
        for word, version in names.items():
            if word in row.kernel:
                dtype = "bfloat16" if row.group == "A1" else "float32"
                options = by_line if row.group == "A1" else Options()
                return ("matmul", version, dtype), options
    if row.group == "A3" and row.kernel[-2:] in ("v1", "v2", "v3"):
        channels, seq_len = (
            int(word[2 if i == 0 else 3 :]) for i, word in enumerate(row.shape.split()[:2])
        )
        return ("mamba", int(row.kernel[-1]), channels, seq_len), by_line
    if row.group == "E" and row.kernel in GEMM_STEPS:
        return ("matmul", GEMM_STEPS[row.kernel], "bfloat16"), by_line
    if row.group == "E" and row.kernel in ("mamba trace step 2", "mamba trace step 3"):
        return ("mamba", 2, 256, 2048), by_line
    if row.group == "E" and row.kernel in ATTENTION_STEPS:
        return ("attention step", int(row.kernel[-1])), by_line
    if row.group == "E" and row.kernel == "depthwise conv1d trace step 0":
        return ("conv", 8, 512, 2048), by_line
    if row.group == "D":
        return ("nkibench", row.kernel.split()[1]), by_line
    if row.group == "H" and row.kernel.startswith("attention"):
        seq_len = int(row.shape.split("seq")[1])
        dtype = "float32" if row.dtype == "fp32" else "bfloat16"
        return ("attention", seq_len, dtype, "fused" in row.kernel), Options()
    return None


def _build(key: tuple[object, ...]) -> Log:
    builders: dict[str, Callable[..., Log]] = {
        "matmul": lambda version, dtype: matmul(version, 4096, 8192, 8192, dtype),
        "mamba": mamba,
        "nkibench": nkibench,
        "conv": depthwise_conv,
        "attention step": attention_step,
        "attention": lambda seq_len, dtype, fused: attention(seq_len, dtype, fused=fused),
    }
    return builders[str(key[0])](*key[1:])


@lru_cache(maxsize=4)
def _estimate(
    key: tuple[object, ...], generation: str, options: Options, clones: Path | None
) -> tuple[Estimate, str]:
    ran = "stream"
    if clones is not None and (kernel := _public(key)) is not None:
        try:
            return estimate(run(kernel, clones, generation), generation, options), "public kernel"
        except NotRun as error:
            ran = f"stream; {error}"
    return estimate(_build(key), generation, options), ran


def _public(key: tuple[object, ...]) -> Kernel | None:
    """The public kernel behind a stream, where one runs under the present language."""
    if key[0] == "matmul":
        return matmul_kernel(str(key[1]), 4096, 8192, 8192, str(key[2]))
    if key[0] == "mamba":
        version, channels, seq_len = (int(str(x)) for x in key[1:])
        return mamba_kernel(version, channels, seq_len)
    return None


def _metric(row: Row, times: Estimate) -> float | None:
    """What the row measures, in its unit."""
    engines = {"PE active": "tensor", "VectorE active": "vector", "ScalarE active": "scalar"}
    if row.metric in ("latency", "total", "nc_latency", "kernel time"):
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
