"""The comparison with published timings: quick rows within their limits, and honest bookkeeping."""

from dataclasses import replace
from pathlib import Path

import pytest

from nxd_cp.simulators.timing import Options, constants_for, estimate, validation
from nxd_cp.simulators.timing.catalog import source
from nxd_cp.simulators.timing.clones import Kernel, NotRun, run
from nxd_cp.simulators.timing.estimate import lower_bounds
from nxd_cp.simulators.timing.public import matmul_kernel
from nxd_cp.simulators.timing.published import Prediction, not_a_kernel, predict, rows
from nxd_cp.simulators.timing.results import Results
from nxd_cp.simulators.timing.streams.attention_steps import attention_step
from nxd_cp.simulators.timing.streams.conv import depthwise_conv
from nxd_cp.simulators.timing.streams.mamba import mamba
from nxd_cp.simulators.timing.streams.mamba_steps import mamba_step
from nxd_cp.simulators.timing.streams.matmul import matmul
from nxd_cp.simulators.timing.streams.nkibench import nkibench
from nxd_cp.simulators.timing.streams.sd_attention import sd_attention
from nxd_cp.simulators.timing.validation import Scored, limits, quantile, report, score

QUICK = (
    "fused_mamba v2 ch4096 seq512",
    "mamba trace step 5",
    "mamba trace step 6",
    "depthwise conv1d trace step 2",
    "SD attention trace step 6",
    "mamba trace step 2",
    "NKIBench silu",
    "attention trace step 8",
    "NKIBench rmsnorm_matmul",
    "NKIBench matmul_add_rmsnorm",
)
WORST = 0.40  # what the model claims for any published kernel over 50 us


def _quick():
    return [row for row in rows() if row.use == "score" and row.name.startswith(QUICK)]


def _summary(scored):
    return report(scored, "title").splitlines()[-1].strip()


@pytest.mark.parametrize("row", _quick(), ids=lambda row: row.name[:60])
def test_quick_kernels_are_within_the_worst_that_is_claimed(row):
    scored = Scored(row, predict(row))
    assert scored.judged == "kernel"
    assert abs(scored.error) <= WORST, f"{scored.prediction} for {row}"
    assert scored.band in ("in", "-"), f"{scored.prediction} for {row}"


def test_every_row_has_a_source_and_a_use():
    assert len(rows()) > 100
    for row in rows():
        assert row.use in ("fit", "score", "fit-suite", "score-suite")
        assert len(row.source) > 10
        assert row.value > 0


def test_a_row_that_did_not_run_counts_as_a_miss():
    row = _quick()[0]
    ran = Scored(row, Prediction(row.value, 1e6, 0.0, "kernel"))
    missed = Scored(row, None, "no instruction stream for this kernel")
    assert _summary([ran, missed]) == "scored 1 of 2 scorable rows"
    assert "not run" in report([ran, missed], "title")


def test_a_row_that_times_a_framework_is_not_scorable():
    framework = next(row for row in rows() if not_a_kernel(row))
    ran = Scored(_quick()[0], Prediction(1.0, 1e6, 0.0, "kernel"))
    assert _summary([ran, Scored(framework, None, "framework")]) == "scored 1 of 1 scorable rows"


def test_a_bad_prediction_shows_in_the_report():
    row = replace(_quick()[0], value=1.0)
    text = report([Scored(row, Prediction(3.0, 1e6, 0.0, "kernel"))], "title")
    assert "+200.0%" in text
    assert "worst +200.0 %" in text


def test_the_report_counts_the_times_between_bound_and_pessimistic():
    row = replace(_quick()[0], value=5.0)
    given = [(1.0, 9.0), (6.0, 9.0), (1.0, 4.0)]
    scored = [Scored(row, Prediction(5.0, 1e6, 0.0, "kernel", "stream", band)) for band in given]
    assert [item.band for item in scored] == ["in", "below", "above"]
    text = report([*scored, Scored(row, Prediction(5.0, 1e6, 0.0, "kernel"))], "title")
    assert "pessimistic: 1 of 3, 1 below the bound, 1 above pessimistic" in text
    assert [line.split()[5] for line in text.splitlines()[2:6]] == ["in", "below", "above", "-"]


def test_the_bound_of_many_small_instructions_is_below_the_published_time():
    """One of the 32 equal parts of the convolution whose instructions take 38 ns each."""
    (row,) = [row for row in rows() if row.name.startswith("depthwise conv1d trace step 1")]
    log = depthwise_conv(1, 128, 2048, psum=True)
    values = constants_for("gen2").at("low")
    busy = lower_bounds(log, "gen2", Options())["vector"] - values.kernel_start - values.kernel_end
    assert 0 < 32 * busy < row.value * 1e6


def test_limits_are_judged_by_class_and_a_row_that_did_not_run_breaks_one():
    row = replace(_quick()[0], value=100.0)
    good = [Scored(row, Prediction(104.0, 1e6, 0.0, "kernel"))] * 9
    assert all(kept for _, kept in limits(good, "score"))
    one_off = [*good, Scored(row, Prediction(150.0, 1e6, 0.0, "kernel"))]
    assert [text for text, kept in limits(one_off, "score") if not kept] == [
        "kernel: worst 50.0 %, at most 40 %"
    ]
    missed = [*good, Scored(row, None, "no instruction stream for this kernel")]
    assert next(kept for _, kept in limits(missed, "score")) is False
    undercut = [*good, Scored(row, Prediction(104.0, 1e6, 0.0, "kernel", "stream", (101.0, 120.0)))]
    assert [text for text, kept in limits(undercut, "score") if not kept] == [
        "no published time is below its bound (1 are)"
    ]
    assert limits(missed, "fit") == []


def test_a_validation_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        validation, "predict", lambda row, clones: ran.append(row) or f"tried {row.name}"
    )
    file = tmp_path / "results.jsonl"
    first = score("score-suite", None, None, Results(file, None))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n")
    ran.clear()
    assert score("score-suite", None, None, Results(file, None)) == first
    assert len(ran) == len(lines) - 3
    ran.clear()
    score("score-suite", None, None, Results(file, tmp_path))  # other clones: nothing is known
    assert len(ran) == len(lines)


def test_a_kept_prediction_is_the_one_that_was_made(tmp_path):
    row = _quick()[0]
    made = Prediction(1.5, 2.5, 0.1, "kernel", "stream", (1.0, 3.0))
    Results(tmp_path / "file", None).put(row, made)
    assert Results(tmp_path / "file", None).get(row) == made
    assert Results(tmp_path / "file", None, fresh=True).get(row) is None


def test_quantile_is_the_smallest_value_that_covers_the_share():
    values = [float(i) for i in range(1, 11)]
    assert quantile(values, 0.9) == 9
    assert quantile(values, 0.5) == 5
    assert quantile([3.0], 0.9) == 3


def test_the_lines_of_a_stream_are_its_own_so_that_each_has_a_dma_queue():
    lines = matmul("tiled", 128, 256, 512).lines
    assert {Path(file).name for file, _ in lines} == {"matmul.py"}
    assert len(lines) == 5


def test_unknown_versions_and_kernels_are_caught():
    with pytest.raises(ValueError, match="version: expected one of tiled"):
        matmul("fast", 128, 128, 512)
    with pytest.raises(ValueError, match="name: expected one of silu"):
        nkibench("softmax")
    with pytest.raises(ValueError, match="step: expected one of 0, 1, 3, 7, 8, got 5"):
        attention_step(5)
    with pytest.raises(ValueError, match="step: expected 5, 6 or 7, got 4"):
        mamba_step(4)
    with pytest.raises(ValueError, match="step: expected 1 or 6, got 2"):
        sd_attention(2)
    with pytest.raises(ValueError, match="version: expected 1, 2 or 3, got 4"):
        mamba(4, 128, 512)


KERNEL = """
import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def nki_matmul_tiled_(lhsT, rhs):
    out = nl.ndarray((128, 512), dtype=lhsT.dtype, buffer=nl.shared_hbm)
    a = nl.ndarray((128, 128), dtype=lhsT.dtype, buffer=nl.sbuf)
    b = nl.ndarray((128, 512), dtype=rhs.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=lhsT)
    nisa.dma_copy(dst=b, src=rhs)
    acc = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=acc, stationary=a, moving=b)
    result = nl.ndarray((128, 512), dtype=out.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=result, src=acc)
    nisa.dma_copy(dst=out, src=result)
    return out
"""

PACKAGED = """
import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def scaled(data, row=None, times=1):
    out = nl.ndarray(data.shape, dtype=data.dtype, buffer=nl.shared_hbm)
    a = nl.ndarray(data.shape, dtype=data.dtype, buffer=nl.sbuf)
    b = nl.ndarray(data.shape, dtype=data.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=data)
    nisa.dma_copy(dst=b, src=row)
    for _ in range(times):
        nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.multiply)
    nisa.dma_copy(dst=out, src=a)
    return out
"""


def _clone(tmp_path, kernel, text):
    file = tmp_path / kernel.folder / kernel.file
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_a_kernel_in_a_clone_is_run_and_takes_the_time_of_its_stream(tmp_path):
    kernel = matmul_kernel("tiled", 128, 128, 512, "bfloat16")
    _clone(tmp_path, kernel, KERNEL)
    log = run(kernel, tmp_path, "gen3")
    alone = estimate(matmul("tiled", 128, 128, 512), "gen3")
    assert estimate(log, "gen3").expected_ns == alone.expected_ns


def test_a_kernel_in_a_package_takes_named_arrays_and_options(tmp_path):
    kernel = Kernel(
        folder="library/src",
        package="stand_in_for_a_library",
        module="core.scaled",
        function="scaled",
        arrays=(((128, 64), "bfloat16"),),
        named=(("row", ((128, 64), "bfloat16")),),
        options=(("times", 3),),
    )
    _clone(tmp_path, kernel, PACKAGED)
    log = run(kernel, tmp_path, "gen2")
    assert log.counts() == {"dma_copy": 3, "tensor_tensor": 3}


def test_a_kernel_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotRun, match=r"matrix_multiplication_nki_kernels\.py is not below"):
        run(matmul_kernel("tiled", 128, 128, 512, "bfloat16"), tmp_path, "gen3")


def test_every_row_of_the_library_has_its_kernel_and_needs_a_clone():
    suite = [row for row in rows() if row.use.endswith("-suite")]
    assert [row.use for row in suite].count("fit-suite") == 3
    assert [row.use for row in suite].count("score-suite") == 8
    for row in suite:
        kernel = source(row).kernel
        assert kernel.function == "attention_cte"
        (q, _), _, (v, _) = kernel.arrays
        assert f"bs={q[0]}" in row.shape
        assert f"seqlen_kv={v[1]}" in row.shape
        assert f"d={v[2]}," in row.shape
        assert predict(row) == "its public kernel needs clones"
