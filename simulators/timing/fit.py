"""How the fitted constants were got: each from published rows marked `fit`, by arithmetic.

Does: recompute every constant tagged "derived" that has rows behind it. Does not: write the tables;
gen2.py and gen3.py hold rounded values, and a test compares them with these. Print them with
`python scripts/fit_timing.py [PATH_TO_CLONES]`; one fit runs public kernels and needs the clones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nxd_cp.simulators.nki_api.log import Log

from .catalog import source
from .clones import run
from .constants import constants_for
from .program import Options, Program
from .published import NS_PER, Row, rows
from .together import replay

ENGINES = 16
PACKET = 4096.0


@dataclass(frozen=True)
class Fit:
    """A constant as the rows give it. rounding: how far the table may round it, relative."""

    generation: str
    constant: str
    value: float
    rows: tuple[Row, ...]
    how: str
    rounding: float = 0.05


def _row(group: str, *words: str) -> Row:
    for row in rows():
        text = f"{row.kernel} | {row.shape} | {row.metric}"
        if row.group == group and row.use == "fit" and all(word in text for word in words):
            return row
    raise AssertionError(f"no fit row in group {group} with {words}")


def fits() -> list[Fit]:
    """All fits, in the order of the constants."""
    return [*_vector_and_scalar(), *_dma_gen2(), *_dma_gen3()]


def _vector_and_scalar() -> list[Fit]:
    """Issue overhead of gen2: streams of instructions, less their elements.

    The 64 wide instructions of the first row take a scalar per partition each (the probe's source),
    the 512 wide ones of the second do not.
    """
    c = constants_for("gen2").at("expected")
    pointer = _row("K2", "64 tensor_scalar")
    plain = _row("K2", "one operand PSUM")
    scalar = _row("K2", "64 activations")
    issue = plain.value * 1e3 / 8 - 512 / c.vector_clock
    with_pointer = pointer.value * 1e3 / 64 - 64 / c.vector_clock
    on_scalar = scalar.value * 1e3 / 64 - 64 / c.scalar_clock
    return [
        Fit("gen2", "vector_issue", issue, (plain,), "512-wide stream, less N / clock"),
        Fit(
            "gen2",
            "vector_pointer",
            with_pointer - issue,
            (pointer, plain),
            "64-wide stream with a scalar per partition, less N / clock and vector_issue",
        ),
        Fit("gen2", "scalar_issue", on_scalar, (scalar,), "64-wide stream, less N / clock"),
    ]


def _dma_gen2() -> list[Fit]:
    """Two unknowns, ns per packet and bytes per ns, from 512 B and 4 KiB packets.

    The stream of long packets is not used: sixteen engines at the pace of one alone would move 290
    B/ns, so the core's rate sets its pace, which is a constant of its own.
    """
    single, short = _row("A7", "DMA 32 KiB"), _row("K2", "[128,16,512 B]")
    queue, tiny = _row("K2", "four [32,8 KB]"), _row("A7", "DMA 4 B")
    per_4k = single.value / 8
    per_512 = ENGINES * 512.0 / short.value
    rate = (PACKET - 512.0) / (per_4k - per_512)
    packet = per_512 - 512.0 / rate
    short_rate = (512.0 - 4.0) / (per_512 - tiny.value)
    return [
        Fit(
            "gen2",
            "dma_engine_rate",
            rate,
            (short, single),
            "slope between packets of 512 B (a stream) and 4 KiB (one engine alone)",
        ),
        Fit(
            "gen2",
            "dma_packet",
            packet,
            (short, single),
            "intercept of the same line",
            rounding=0.1,
        ),
        Fit(
            "gen2",
            "dma_short_rate",
            short_rate,
            (tiny, short),
            "slope between packets of 4 B and 512 B",
        ),
        Fit(
            "gen2",
            "dma_short_packet",
            tiny.value - 4.0 / short_rate,
            (tiny, short),
            "intercept of the same line",
        ),
        Fit(
            "gen2",
            "dma_software_issue",
            32 * 8192 / queue.value,
            (queue,),
            "32 x 8 KiB per DMA: the queue, not the engines, sets the pace",
        ),
    ]


def _dma_gen3() -> list[Fit]:
    rate = constants_for("gen3").dma_engine_rate.expected
    single = _row("A6", "DMA 32 KiB")
    return [
        Fit(
            "gen3",
            "dma_packet",
            single.value / 8 - PACKET / rate,
            (single,),
            "8 packets of 4 KiB on one engine, at the documented rate",
        ),
    ]


def transpose_fit(clones: Path) -> Fit:
    """The share of the DMA rate that a transpose on chip gets: mean over the rows `fit-suite`.

    Each row is a prefill attention that transposes its weights by DMA; the share is searched that
    gives its time. Raises NotRun when a kernel is not below `clones` or does not run.
    """
    found = [row for row in rows() if row.use == "fit-suite"]
    shares = []
    for row in found:
        kernel = getattr(source(row), "kernel", None)
        assert kernel is not None, f"no kernel behind {row.name}"
        log = run(kernel, clones, row.generation)
        shares.append(_share(log, row.value * NS_PER[row.unit]))
    listed = ", ".join(f"{share:.3f}" for share in shares)
    return Fit(
        "gen3",
        "dma_transpose_share",
        sum(shares) / len(shares),
        tuple(found),
        f"the share that gives each of {len(shares)} attention_cte rows its time: {listed}; mean",
    )


def _share(log: Log, wanted_ns: float, low: float = 0.3, high: float = 0.6) -> float:
    """The share at which a log takes `wanted_ns`, by halving; a larger share is faster."""
    for _ in range(8):
        middle = (low + high) / 2
        if _time(log, middle) > wanted_ns:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _time(log: Log, share: float) -> float:
    table = constants_for("gen3")
    constant = replace(table.dma_transpose_share, expected=share)
    values = replace(table, dma_transpose_share=constant).at("expected")
    return replay(Program(log, "gen3", values, Options())).total_ns
