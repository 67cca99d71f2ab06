"""Constants of NeuronCore-v2 (gen2: trn1, inf2), per core. Times are ns, rates bytes per ns.

Sources, by short name:
ARCH  AWS Neuron SDK docs, nki/guides/architecture/trainium_inferentia2_arch.rst
ISA   AWS Neuron SDK docs v2.26, nki.isa reference pages (cost notes, since dropped)
PERF  AWS Neuron SDK docs, nki/deep-dives/nki_perf_guide.rst (figures)
DMABW AWS Neuron SDK docs, nki/deep-dives/nki-dma-bandwidth-guide.rst
KILN  foxl-ai/kiln docs/neuron-notes.md and tools/probe_prefill_vector.py (trn1.2xlarge, NKI 0.6.0)
"""

from .constants import Constant, Constants, same

CONSTANTS = Constants(
    generation="gen2",
    note="measured or documented on trn1 except where tagged guess",
    tensor_clock=same(2.8, "GHz", "documented", "ARCH, engine table"),
    tensor_sustained=Constant(
        1.0, 0.875, 0.875, "share of clock", "measured", "KILN: 2.45 G columns/s in chains"
    ),
    tensor_cold=same(1.0, "share of clock", "documented", "unused: no warm-up on gen2"),
    tensor_window=same(3413.0, "ns", "documented", "unused: no warm-up on gen2"),
    tensor_window_share=same(0.0, "share busy", "documented", "unused: no warm-up on gen2"),
    matmul_min_columns=same(64.0, "columns", "documented", "ARCH, TensorE cost"),
    matmul_overhead=Constant(0.0, 0.0, 4.0, "columns", "guess", "gen3's, unless KILN includes it"),
    matmul_latency=Constant(130.0, 142.0, 173.0, "ns", "measured", "PERF: 188 ns for N=128"),
    matmul_fp32_passes=same(4.0, "passes", "documented", "ISA nc_matmul"),
    transpose_fp32_passes=Constant(
        1.0,
        2.0,
        4.0,
        "passes",
        "documented",
        "ISA nc_matmul: ones and zeros moving, 2x; nc_transpose",
    ),
    transpose_background=same(1.0, "share of passes", "documented", "from gen4 only"),
    weights_columns_per_cycle=Constant(
        4.0, 4.0, 2.0, "columns per cycle", "documented", "ARCH, fast LoadStationary (up to)"
    ),
    vector_clock=same(1.12, "GHz", "documented", "ARCH, engine table"),
    vector_issue=Constant(3.0, 10.4, 36.0, "ns", "derived", "fit: KILN, eight N=512"),
    vector_latency=Constant(
        89.0, 152.0, 358.0, "ns", "guess", "gen3's; ARCH ~100 cycles; PERF 358"
    ),
    vector_pointer=Constant(0.0, 23.7, 64.0, "ns", "derived", "fit: KILN, 64 with a scalar a row"),
    vector_min_interval=Constant(
        0.0, 64.0, 100.0, "cycles", "documented", "ISA, MIN_II; ARCH, access and static overhead"
    ),
    scalar_clock=same(1.4, "GHz", "documented", "ARCH, engine table"),
    scalar_issue=Constant(6.0, 23.5, 30.0, "ns", "derived", "fit: KILN 64 activations of N=64"),
    scalar_copy_issue=Constant(6.0, 23.5, 30.0, "ns", "derived", "as scalar_issue"),
    scalar_latency=Constant(150.0, 158.0, 200.0, "ns", "measured", "PERF: 159 ns for one element"),
    scalar_copy_latency=Constant(150.0, 158.0, 200.0, "ns", "guess", "as a function"),
    scalar_min_interval=Constant(
        0.0, 64.0, 100.0, "cycles", "documented", "ISA, MIN_II; ARCH, access and static overhead"
    ),
    table_load=Constant(0.0, 1290.0, 1300.0, "ns", "guess", "gen3's"),
    accumulator_read=same(64.0, "cycles", "documented", "ARCH, ScalarE accumulators"),
    gpsimd_clock=same(1.4, "GHz", "documented", "ARCH, engine table"),
    gpsimd_base=same(150.0, "cycles", "documented", "ISA iota, affine_select"),
    gpsimd_cycles_per_element=Constant(1.0, 1.0, 2.0, "cycles", "documented", "ISA affine_select"),
    semaphore=Constant(25.0, 30.0, 60.0, "ns", "derived", "PERF: chain of 189 less 159 ns"),
    stride_factor=same(2.0, "times", "documented", "ARCH, innermost stride over 16 B"),
    dma_engine_rate=Constant(
        27.2, 20.5, 17.0, "B/ns", "derived", "fit: KILN, PERF 32 KiB; low: nki-dma-overview.rst"
    ),
    dma_packet=Constant(20.0, 26.0, 28.0, "ns", "derived", "fit: KILN and PERF 32 KiB rows"),
    dma_short_rate=Constant(12.0, 11.5, 10.0, "B/ns", "derived", "fit: PERF 4 B, KILN 512 B rows"),
    dma_short_packet=Constant(6.0, 6.7, 7.0, "ns", "derived", "fit: PERF 4 B, KILN 512 B rows"),
    dma_packet_bytes=same(4096.0, "B", "documented", "compute-comm-overlap.rst, packet size"),
    dma_core_rate=Constant(273.5, 265.0, 262.0, "B/ns", "measured", "KILN 262.5; 273.5 active"),
    dma_software_issue=Constant(1300.0, 1335.0, 1380.0, "ns", "derived", "fit: KILN per-DMA rows"),
    dma_software_start=Constant(1000.0, 1300.0, 1500.0, "ns", "documented", "DMABW, to start"),
    dma_hardware_issue=same(1335.0, "ns", "documented", "unused: no hardware generation"),
    dma_hardware_start=same(1300.0, "ns", "documented", "unused: no hardware generation"),
    dma_done=Constant(180.0, 310.0, 370.0, "ns", "guess", "gen3's"),
    dma_transpose_share=same(0.5, "share of rate", "guess", "gen3's bound"),
    dma_transpose_hbm_share=same(0.9, "share of rate", "guess", "gen3's bound"),
    dma_compute_share=same(0.5, "share of rate", "documented", "ARCH gen4, DMA accumulate before"),
    collective_start=Constant(500.0, 4000.0, 50000.0, "ns", "guess", "nccom-test.rst, examples"),
    collective_hop=Constant(
        1000.0, 1500.0, 2000.0, "ns", "documented", "intranode-collective-comm.rst: 1-2 us"
    ),
    collective_rate=Constant(96.0, 37.5, 24.0, "B/ns", "guess", "nccom-test.rst, permute; links"),
    core_barrier=same(0.0, "ns", "documented", "no pairs of cores on gen2"),
    # Low: 256 loads that are all skipped (KILN) leave no time for a start and an end.
    kernel_start=Constant(0.0, 6500.0, 8000.0, "ns", "guess", "gen3's; low: KILN"),
    kernel_end=Constant(0.0, 2100.0, 2500.0, "ns", "guess", "gen3's; low: KILN"),
    loop_iteration=Constant(
        1000.0, 1400.0, 2000.0, "ns", "measured", "KILN: 64 iterations of one op"
    ),
)
