"""How the fitted constants were got: each from published rows marked `fit`, by arithmetic.

Does: recompute every constant tagged "derived" that has rows behind it. Does not: write the tables;
gen2.py and gen3.py hold rounded values, and a test compares them with these. Print them with
`python scripts/fit_timing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .constants import constants_for
from .published import Row, rows

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
    """Issue overhead of gen2: a stream of short instructions, less their elements."""
    c = constants_for("gen2").at("expected")
    vector = _row("K2", "64 tensor_scalar")
    psum = _row("K2", "one operand PSUM")
    scalar = _row("K2", "64 activations")
    short = vector.value * 1e3 / 64 - 64 / c.vector_clock
    wide = psum.value * 1e3 / 8 - 512 / c.vector_clock
    on_scalar = scalar.value * 1e3 / 64 - 64 / c.scalar_clock
    return [
        Fit(
            "gen2",
            "vector_issue",
            short,
            (vector, psum),
            f"64-wide stream gives {short:.1f} ns, 512-wide {wide:.1f} ns; the first is taken",
            rounding=0.1,
        ),
        Fit("gen2", "scalar_issue", on_scalar, (scalar,), "64-wide stream, less N / clock"),
    ]


def _dma_gen2() -> list[Fit]:
    """Two unknowns, ns per packet and bytes per ns, from 512 B and 4 KiB packets."""
    long, short = _row("K2", "HBM->SBUF stream"), _row("K2", "[128,16,512 B]")
    single = _row("A7", "DMA 32 KiB")
    queue = _row("K2", "four [32,8 KB]")
    per_4k = (ENGINES * PACKET / long.value + single.value / 8) / 2
    per_512 = ENGINES * 512.0 / short.value
    rate = (PACKET - 512.0) / (per_4k - per_512)
    packet = per_512 - 512.0 / rate
    return [
        Fit(
            "gen2",
            "dma_engine_rate",
            rate,
            (long, short, single),
            "slope between packets of 512 B and 4 KiB (mean of stream and single)",
        ),
        Fit(
            "gen2",
            "dma_packet",
            packet,
            (long, short, single),
            "intercept of the same line",
            rounding=0.1,
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
