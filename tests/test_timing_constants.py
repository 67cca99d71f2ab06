"""The constants of the cost model: complete, ordered, sourced, and equal to the fit they claim."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nxd_cp.simulators.timing import Options, Program, fit, replay
from nxd_cp.simulators.timing.constants import LEVELS, TAGS, Constant, constants_for
from nxd_cp.simulators.timing.fit import fits
from nxd_cp.simulators.timing.streams.builder import Stream

GENERATIONS = ("gen2", "gen3", "gen4")
# Constants that are rates or shares of speed: their low level, the fast one, is the largest.
FASTER_WHEN_LARGER = {
    "tensor_clock",
    "tensor_sustained",
    "tensor_cold",
    "weights_columns_per_cycle",
    "vector_clock",
    "scalar_clock",
    "gpsimd_clock",
    "dma_engine_rate",
    "dma_short_rate",
    "dma_core_rate",
    "dma_packet_bytes",
    "dma_transpose_share",
    "dma_transpose_hbm_share",
    "dma_compute_share",
    "collective_rate",
}


def _out_of_order(name: str, constant: Constant) -> bool:
    values = [constant.at(level) for level in LEVELS]
    return values != sorted(values, reverse=name in FASTER_WHEN_LARGER)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_constant_has_a_source_a_tag_and_ordered_levels(generation):
    for name, constant in constants_for(generation).items():
        assert constant.tag in TAGS, name
        assert len(constant.source) > 3, name
        assert constant.unit, name
        assert not _out_of_order(name, constant), f"{name}: {constant}"


def test_levels_in_the_wrong_order_are_caught():
    name, constant = "vector_latency", constants_for("gen3").vector_latency
    assert not _out_of_order(name, constant)
    assert _out_of_order(name, replace(constant, low=constant.high, high=constant.low))


def test_trn3_says_that_it_is_extrapolated():
    table = constants_for("trn3")
    assert "extrapolated" in table.note
    measured = [name for name, constant in table.items() if constant.tag == "measured"]
    moving_parts = {"vector_latency", "scalar_issue", "matmul_latency", "dma_done", "semaphore"}
    assert not moving_parts & set(measured)


def test_unknown_generation_level_and_constant_are_caught():
    with pytest.raises(ValueError, match=r"expected one of trn1.*got 'trn9'"):
        constants_for("trn9")
    with pytest.raises(ValueError, match="level: expected one of low"):
        constants_for("gen3").at("middle")
    with pytest.raises(AttributeError, match="no constant named 'vector_speed'"):
        _ = constants_for("gen3").at("low").vector_speed


@pytest.mark.parametrize("fit", fits(), ids=lambda fit: f"{fit.generation}-{fit.constant}")
def test_fitted_constants_lie_where_the_fit_puts_them(fit):
    constant = getattr(constants_for(fit.generation), fit.constant)
    low, high = sorted((constant.low, constant.high))
    assert low <= fit.value <= high, f"{fit}: {constant}"
    assert constant.expected == pytest.approx(fit.value, rel=fit.rounding)


def _transposes(count):
    """A kernel of nothing but transposes by DMA on chip."""
    s = Stream()
    for _ in range(count):
        s.dma_transpose(s.sbuf(128, 512), s.sbuf(128, 512))
    return s.log


def test_the_share_of_transposes_is_the_one_that_gives_the_rows_their_times(monkeypatch):
    table = constants_for("gen3")
    share = replace(table.dma_transpose_share, expected=0.42)
    values = replace(table, dma_transpose_share=share).at("expected")
    wanted = replay(Program(_transposes(100), "gen3", values, Options())).total_ns
    asked = []
    rows = [replace(row, value=wanted / 1e3) for row in fit.rows() if row.use == "fit-suite"]
    monkeypatch.setattr(fit, "rows", lambda: rows)
    monkeypatch.setattr(fit, "run", lambda *call: asked.append(call) or _transposes(100))
    found = fit.transpose_fit(Path("clones"))
    assert found.value == pytest.approx(0.42, abs=0.002)
    assert found.rows == tuple(rows)
    assert [call[0].function for call in asked] == ["attention_cte"] * 3


def test_the_share_of_transposes_in_the_table_is_the_one_that_the_docs_give():
    constant = constants_for("gen3").dma_transpose_share
    text = (Path(__file__).parent.parent / "docs" / "timing.md").read_text()
    (share,) = re.findall(r"a transpose on chip gets, ([\d.]+) on trn2", text.replace("\n", " "))
    parts = re.findall(r"`fit-suite`: ([\d.]+), ([\d.]+), ([\d.]+)", text)[0]
    assert constant.expected == float(share)
    assert sum(map(float, parts)) / 3 == pytest.approx(float(share), abs=0.005)


def test_fits_use_rows_marked_fit_only():
    used = [row for fit in fits() for row in fit.rows]
    assert used
    assert {row.use for row in used} == {"fit"}


# Bytes per ns of a chip's HBM and its cores: trainium.rst, trainium2.rst, trainium3.rst.
HBM = {"gen2": (820 * 1.073741824, 2), "gen3": (2900.0, 8), "gen4": (4900.0, 8)}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_memory_of_a_chip_feeds_all_its_cores_at_their_dma_rate(generation):
    """Why contention between cores for HBM is not modelled: there is none at expected rates."""
    rate, cores = HBM[generation]
    assert cores * constants_for(generation).dma_core_rate.expected <= rate
