"""Constants of NeuronCore-v4 (gen4: trn3), per core: EXTRAPOLATED, nothing was measured on trn3.

Clocks, rates and modes are documented; every overhead is gen3's, scaled where the clock changed,
and tagged guess. Sources as in gen3.py; ARCH4 is trainium3_arch.rst.
"""

from dataclasses import replace

from .constants import Constant, same
from .gen3 import CONSTANTS as GEN3


def _guess(constant: Constant, factor: float = 1.0) -> Constant:
    """gen3's value, times `factor`, as a guess with a wider range."""
    return Constant(
        constant.low * factor * 0.8,
        constant.expected * factor,
        constant.high * factor * 1.25,
        constant.unit,
        "guess",
        f"gen3's ({constant.source})",
    )


CONSTANTS = replace(
    GEN3,
    generation="gen4",
    note="extrapolated from gen3: no public measurement of trn3 was found",
    tensor_clock=same(2.4, "GHz", "documented", "ARCH4, engine table"),
    tensor_window=replace(GEN3.tensor_window, tag="guess"),
    matmul_overhead=_guess(GEN3.matmul_overhead),
    matmul_latency=_guess(GEN3.matmul_latency),
    transpose_background=Constant(
        0.5, 0.5, 1.0, "share of passes", "documented", "ARCH4, background transpose: about 2x"
    ),
    vector_clock=same(1.2, "GHz", "documented", "ARCH4, engine table"),
    vector_issue=_guess(GEN3.vector_issue, 0.8),
    vector_latency=_guess(GEN3.vector_latency, 0.8),
    vector_pointer=_guess(GEN3.vector_pointer, 0.8),
    vector_min_interval=replace(GEN3.vector_min_interval, tag="guess"),
    scalar_min_interval=replace(GEN3.scalar_min_interval, tag="guess"),
    scalar_clock=same(1.2, "GHz", "documented", "ARCH4, engine table"),
    scalar_issue=_guess(GEN3.scalar_issue),
    scalar_copy_issue=_guess(GEN3.scalar_copy_issue),
    scalar_latency=_guess(GEN3.scalar_latency),
    scalar_copy_latency=_guess(GEN3.scalar_copy_latency),
    table_load=_guess(GEN3.table_load),
    gpsimd_clock=same(1.2, "GHz", "documented", "ARCH4, engine table"),
    semaphore=_guess(GEN3.semaphore),
    dma_engine_rate=same(38.4, "B/ns", "documented", "nki-dma-overview.rst, engine rate"),
    dma_packet=Constant(14.0, 17.0, 26.0, "ns", "guess", "gives the planned 33 B/ns per engine"),
    dma_short_rate=same(38.4, "B/ns", "guess", "as dma_engine_rate"),
    dma_short_packet=Constant(14.0, 17.0, 26.0, "ns", "guess", "as dma_packet"),
    dma_core_rate=Constant(588.0, 528.0, 470.0, "B/ns", "documented", "DMABW: 16 x 33 B/ns"),
    dma_software_issue=_guess(GEN3.dma_software_issue),
    dma_software_start=_guess(GEN3.dma_software_start),
    dma_hardware_issue=_guess(GEN3.dma_hardware_issue),
    dma_hardware_start=_guess(GEN3.dma_hardware_start),
    dma_done=_guess(GEN3.dma_done),
    dma_transpose_share=replace(GEN3.dma_transpose_share, tag="guess"),
    dma_transpose_hbm_share=replace(GEN3.dma_transpose_hbm_share, tag="guess"),
    dma_compute_share=same(1.0, "share of rate", "documented", "ARCH4, DMA accumulate"),
    collective_hop=_guess(GEN3.collective_hop),
    collective_rate=Constant(128.0, 64.0, 16.0, "B/ns", "guess", "gen3's, with its faster links"),
    kernel_start=_guess(GEN3.kernel_start),
    kernel_end=_guess(GEN3.kernel_end),
)
