"""Costs of single instructions and short streams against published figures, and the rules' edges.

Each expected number is a published one; the tolerance beside it is the one that the model claims:
5 % from 128 elements on, 15 % below.
"""

import pytest

from nxd_cp.simulators.timing import Options, estimate
from nxd_cp.simulators.timing.constants import constants_for
from nxd_cp.simulators.timing.cost import instruction_cost
from nxd_cp.simulators.timing.published import active_ns, predict, rows
from nxd_cp.simulators.timing.streams import primitives
from nxd_cp.simulators.timing.streams.attention import attention
from nxd_cp.simulators.timing.streams.builder import Stream
from nxd_cp.simulators.timing.streams.mamba import mamba
from nxd_cp.simulators.timing.validation import Scored

BY_LINE = Options(dma_queues="line")
LARGE, SMALL = 0.05, 0.15


def test_back_to_back_bf16_matmuls_reach_98_percent_of_peak_on_trn2():
    interval = primitives.matmul_interval_ns("gen3")
    share = 2 * 128 * 128 * 512 / interval / 78.64e3
    assert share == pytest.approx(0.98, rel=LARGE)
    assert share < 1.0


def test_fp32_matmul_of_512_columns_takes_859_ns_on_trn2():
    assert primitives.matmul_interval_ns("gen3", "float32") == pytest.approx(859, rel=LARGE)


def test_dependent_activations_of_one_element_follow_each_189_ns_on_trn1():
    assert primitives.activation_chain_ns("gen2") == pytest.approx(189, rel=SMALL)


def test_fp32_tensor_tensor_takes_15_us_on_trn1_whatever_the_partitions():
    whole = primitives.vector_ns("gen2", "tensor_tensor", 8192, sources=2)
    half = primitives.vector_ns("gen2", "tensor_tensor", 8192, sources=2, partitions=64)
    assert whole == half
    assert whole == pytest.approx(14980, rel=LARGE)


@pytest.mark.parametrize(("elements", "published"), [(128, 401), (4096, 3706)])
def test_exp_on_trn2(elements, published):
    assert primitives.activation_ns("gen3", elements) == pytest.approx(published, rel=LARGE)


def test_32_kib_through_one_dma_engine_take_1416_ns_on_trn2():
    assert primitives.dma_ns("gen3", 4, 4096) == pytest.approx(1416, rel=LARGE)


@pytest.mark.parametrize(("piece", "published"), [(4096, 354), (1024, 259)])
def test_dma_rate_by_piece_on_trn2(piece, published):
    elapsed, size = primitives.dma_stream("gen3", 128, 16384, pieces=16384 // piece)
    assert size / elapsed == pytest.approx(published, rel=LARGE)


def test_self_attention_is_bound_by_vector_with_tensor_near_40_percent_on_trn1():
    log = attention(2048, "bfloat16", fused=True, p_dtype="bfloat16", evict="vector")
    times = estimate(log, "gen2", BY_LINE)
    shares = {q: active_ns(times, q) / times.expected_ns for q in ("tensor", "vector", "scalar")}
    assert max(shares, key=lambda name: shares[name]) == "vector"
    assert shares["tensor"] == pytest.approx(0.40, rel=SMALL)


def test_mamba_is_bound_by_vector_and_near_its_published_time_on_trn1():
    times = estimate(mamba(1, 256, 512), "gen2", BY_LINE)
    values = constants_for("gen2").at("expected")
    core = times.expected_ns - values.kernel_start - values.kernel_end
    assert active_ns(times, "vector") / core == pytest.approx(0.987, rel=LARGE)
    # 6 % low: of the published time 22 us are start and end, and this model has trn2's, 9 us.
    assert times.expected_ns == pytest.approx(172_930, rel=SMALL)


PRIMITIVES = [
    row
    for row in rows()
    if row.group in ("A6", "A7", "B0", "K2")
    and not isinstance(found := predict(row), str)
    and found.kind != "kernel"
]
# Rows marked `fit` that the constants do not meet: the first is below the other measurements of the
# same, and for the second no rule is known.
NOT_MET = ("GpSimd trigger -> first DMA byte", "tensor_tensor fp8 x fp32")


@pytest.mark.parametrize("row", PRIMITIVES, ids=lambda row: f"{row.group} {row.name}"[:70])
def test_every_published_primitive_is_met(row):
    scored = Scored(row, predict(row))
    limit = LARGE if scored.judged == "primitive" else SMALL
    met = abs(scored.error) <= limit
    known = row.use == "fit" and any(words in row.name for words in NOT_MET)
    assert met != known, f"{scored.prediction} for {row}"


def test_a_wrong_constant_is_caught_by_the_published_primitives(monkeypatch):
    import dataclasses

    from nxd_cp.simulators.timing import gen3
    from nxd_cp.simulators.timing.constants import same

    slow = same(0.8, "GHz", "guess", "wrong on purpose")
    monkeypatch.setattr(gen3, "CONSTANTS", dataclasses.replace(gen3.CONSTANTS, vector_clock=slow))
    constants_for.cache_clear()
    try:
        duration = primitives.vector_ns("gen3", "tensor_reduce", 16384)
    finally:
        constants_for.cache_clear()
    assert abs(duration / 17_300 - 1) > LARGE


def test_fast_modes_of_vector_by_dtype_and_place():
    def passes(opcode, dtype, source="sbuf", sources=1, generation="gen3"):
        long, short = (
            primitives.vector_ns(generation, opcode, n, dtype=dtype, source=source, sources=sources)
            for n in (2048, 1024)
        )
        return (long - short) * constants_for(generation).vector_clock.expected / 1024

    assert passes("tensor_copy", "bfloat16") == pytest.approx(0.25)
    assert passes("tensor_copy", "bfloat16", generation="gen2") == pytest.approx(1)
    assert passes("tensor_copy", "bfloat16", source="psum") == pytest.approx(0.5)
    assert passes("tensor_copy", "float32", source="psum") == pytest.approx(1)
    assert passes("tensor_tensor", "float32", sources=2) == pytest.approx(2)
    assert passes("tensor_tensor", "float32", source="psum", sources=2) == pytest.approx(1)
    assert passes("tensor_tensor", "bfloat16", sources=2) == pytest.approx(0.5)


def test_transposes_and_fp32_cost_their_passes():
    def held(generation, dtype, transpose):
        s = Stream()
        data = s.sbuf(128, 128, dtype=dtype)
        if transpose:
            s.transpose(s.psum(128, 128, dtype=dtype), data)
        else:
            s.matmul(s.psum(128, 128), data, data)
        line = primitives.time(s.log, generation)
        return line.program.costs[0].occupancy_ns

    assert held("gen3", "float32", False) == pytest.approx(4 * held("gen3", "bfloat16", False))
    assert held("gen3", "float32", True) == pytest.approx(2 * held("gen3", "bfloat16", True))
    assert held("gen2", "float32", True) == pytest.approx(2 * held("gen2", "bfloat16", True))
    assert held("gen4", "bfloat16", True) == pytest.approx(held("gen4", "bfloat16", False) / 2)


def test_an_instruction_without_a_rule_is_named():
    values = constants_for("gen3").at("expected")
    with pytest.raises(ValueError, match="no cost rule for warp_shuffle on VectorE"):
        instruction_cost("gen3", "warp_shuffle", "vector", "", 0, 8, None, (), values)
    with pytest.raises(ValueError, match="no cost rule for warp_shuffle on GpSimdE"):
        instruction_cost("gen3", "warp_shuffle", "gpsimd", "", 0, 8, None, (), values)
    with pytest.raises(ValueError, match="no cost rule for fly on engine 'moon'"):
        instruction_cost("gen3", "fly", "moon", "", 0, 8, None, (), values)
