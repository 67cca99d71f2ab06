"""Constants of NeuronCore-v3 (gen3: trn2), per core. Times are ns, rates bytes per ns.

Sources, by short name:
ARCH  AWS Neuron SDK docs, nki/guides/architecture/trainium2_arch.rst
ISA   AWS Neuron SDK docs v2.26, nki.isa reference pages (cost notes, since dropped)
PERF  AWS Neuron SDK docs, nki/deep-dives/nki_perf_guide.rst
DMA   AWS Neuron SDK docs, nki/get-started/about/nki-dma-overview.rst (figures)
DMABW AWS Neuron SDK docs, nki/deep-dives/nki-dma-bandwidth-guide.rst
DGE   AWS Neuron SDK docs, nki/deep-dives/nki-dge.rst
EXPL  AWS Neuron SDK docs, tools/neuron-explorer/overview-summary-page.rst
SKILL aws-neuron/neuron-agentic-development, neuron-nki-profile-querying references
PROF  allenkchau/trainium-kernel-fusion at d709ddf, profiling/artifacts/* (ten full profiles)
"""

from .constants import Constant, Constants, same

CONSTANTS = Constants(
    generation="gen3",
    note="measured or documented on trn2 except where tagged guess",
    # TensorE: a matmul streams max(min columns, N) + overhead columns per pass.
    tensor_clock=same(2.4, "GHz", "documented", "ARCH, engine table"),
    tensor_sustained=same(1.0, "share of clock", "derived", "PROF: 213 ns for N=512 when warm"),
    tensor_cold=same(0.5, "share of clock", "documented", "EXPL, throttling; PROF throttle events"),
    tensor_window=Constant(3000.0, 3413.0, 3413.0, "ns", "measured", "PROF throttle events; EXPL"),
    tensor_window_share=same(0.5, "share busy", "documented", "EXPL, throttling"),
    matmul_min_columns=same(64.0, "columns", "documented", "ARCH gen2, TensorE cost"),
    matmul_overhead=Constant(0.0, 4.0, 9.0, "columns", "measured", "PROF: 215 ns, fp32 859 ns"),
    matmul_latency=Constant(150.0, 165.0, 205.0, "ns", "measured", "PROF: duration less stream"),
    matmul_fp32_passes=same(4.0, "passes", "documented", "ISA nc_matmul; PROF two double passes"),
    transpose_fp32_passes=same(2.0, "passes", "documented", "ARCH, fp32 transpose; PROF"),
    transpose_background=same(1.0, "share of passes", "documented", "from gen4 only"),
    weights_columns_per_cycle=Constant(
        4.0, 4.0, 2.0, "columns per cycle", "documented", "ARCH gen2, fast LoadStationary (up to)"
    ),
    # VectorE: occupied for issue + cycles / clock but at least the minimum interval; the result is
    # out after latency + cycles / clock.
    vector_clock=same(0.96, "GHz", "documented", "ARCH, engine table"),
    vector_issue=Constant(19.0, 62.0, 66.0, "ns", "measured", "PROF: 598 ns per reduce of N=512"),
    vector_latency=Constant(148.0, 152.0, 158.0, "ns", "measured", "PROF: durations"),
    vector_pointer=Constant(0.0, 64.0, 64.0, "ns", "measured", "PROF: tensor_scalar by [P, 1]"),
    vector_min_interval=Constant(
        0.0,
        64.0,
        100.0,
        "cycles",
        "documented",
        "ISA, MIN_II; ARCH gen2, access and static overhead",
    ),
    # ScalarE: functions and copies differ.
    scalar_clock=same(1.2, "GHz", "documented", "ARCH, engine table"),
    scalar_issue=Constant(143.0, 150.0, 185.0, "ns", "measured", "PROF: 570-586 ns per exp N=512"),
    scalar_copy_issue=Constant(40.0, 50.0, 60.0, "ns", "measured", "PROF: back-to-back copies"),
    scalar_latency=Constant(253.0, 278.0, 294.0, "ns", "measured", "PROF exp; DMA 401 and 3706 ns"),
    scalar_copy_latency=Constant(155.0, 158.0, 160.0, "ns", "measured", "PROF: 585 ns for N=512"),
    scalar_min_interval=Constant(
        0.0,
        64.0,
        100.0,
        "cycles",
        "documented",
        "ISA, MIN_II; ARCH gen2, access and static overhead",
    ),
    table_load=Constant(1283.0, 1290.0, 1300.0, "ns", "measured", "PROF ACT_TABLE_LOAD; DMA"),
    accumulator_read=same(64.0, "cycles", "documented", "ARCH gen2, ScalarE accumulators"),
    # GpSimdE: base + per-element cycles.
    gpsimd_clock=same(1.2, "GHz", "documented", "ARCH, engine table"),
    gpsimd_base=same(150.0, "cycles", "documented", "ISA iota, affine_select"),
    gpsimd_cycles_per_element=Constant(1.0, 1.0, 2.0, "cycles", "documented", "ISA affine_select"),
    semaphore=Constant(33.0, 45.0, 60.0, "ns", "measured", "PROF: end of producer to start"),
    stride_factor=Constant(1.0, 2.0, 2.0, "times", "documented", "ARCH gen2, stride over 16 B"),
    # DMA: 16 engines, each packets * packet + bytes / rate; then one cap for the core.
    dma_engine_rate=same(27.2, "B/ns", "documented", "DMA, engine rate"),
    dma_packet=Constant(
        20.0, 26.0, 30.0, "ns", "derived", "fit: 1416 ns for 32 KiB; 1, 4 KiB rows"
    ),
    # Short packets: no measurement here as there is on gen2, so the same line.
    dma_short_rate=same(27.2, "B/ns", "guess", "as dma_engine_rate"),
    dma_short_packet=Constant(20.0, 26.0, 30.0, "ns", "guess", "as dma_packet"),
    dma_packet_bytes=same(4096.0, "B", "documented", "compute-comm-overlap.rst, packet size"),
    dma_core_rate=Constant(435.0, 354.0, 332.0, "B/ns", "measured", "SKILL 4 KiB rows; PROF 332"),
    dma_software_issue=Constant(570.0, 581.0, 620.0, "ns", "measured", "PROF: GpSimd triggers"),
    dma_software_start=Constant(616.0, 800.0, 890.0, "ns", "measured", "DMA 739; PROF 739-890"),
    dma_hardware_issue=Constant(517.0, 545.0, 600.0, "ns", "measured", "PROF: Sync; DGE 600"),
    dma_hardware_start=Constant(750.0, 1330.0, 1400.0, "ns", "measured", "PROF: first byte"),
    dma_done=Constant(180.0, 310.0, 370.0, "ns", "measured", "DMA: end of DMA to ACT start; PROF"),
    dma_transpose_share=Constant(
        0.5, 0.45, 0.37, "share of rate", "derived", "fit: three attention_cte rows; ARCH: <= 0.5"
    ),
    dma_transpose_hbm_share=Constant(
        0.9, 0.9, 0.67, "share of rate", "documented", "ARCH: <= 0.9; high falls as on chip"
    ),
    dma_compute_share=same(0.5, "share of rate", "documented", "ARCH gen4, DMA accumulate before"),
    # Between cores. nccom-test.rst: 8 KiB to 8 ranks in 10 us, 64 KiB to 32 in 8 us, older ones in
    # 58 to 150 us; 32 MiB permuted by 8 ranks in 894 us. Its instances are not named.
    collective_start=Constant(500.0, 4000.0, 50000.0, "ns", "guess", "nccom-test.rst, examples"),
    collective_hop=Constant(
        1000.0, 1500.0, 2000.0, "ns", "documented", "intranode-collective-comm.rst: 1-2 us"
    ),
    collective_rate=Constant(64.0, 37.5, 16.0, "B/ns", "guess", "nccom-test.rst, permute; links"),
    core_barrier=Constant(100.0, 500.0, 2000.0, "ns", "guess", "two semaphores and a poll"),
    kernel_start=Constant(5500.0, 6500.0, 8000.0, "ns", "derived", "PROF start less host latency"),
    kernel_end=Constant(1800.0, 2100.0, 2500.0, "ns", "measured", "PROF: last DMA to end"),
    loop_iteration=Constant(1000.0, 1400.0, 2000.0, "ns", "guess", "as measured on gen2"),
)
