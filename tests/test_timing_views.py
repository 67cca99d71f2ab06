"""Trace, profile and pictures: valid files whose numbers are the timeline's."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.simulators.timing import estimate
from nxd_cp.simulators.timing.cli import Block, run_profile, run_trace, time_block
from nxd_cp.simulators.timing.profile import hbm_bytes, summary, table
from nxd_cp.simulators.timing.streams.attention import attention
from nxd_cp.simulators.timing.trace import document

SMALL = Block(queries=128, keys=128)


@pytest.fixture(scope="module")
def times():
    return estimate(attention(512, "bfloat16", fused=True), "gen3")


def _events(trace, phase):
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def _lanes_overlap(trace):
    """Whether two slices of one lane share time: a viewer would nest or drop them."""
    lanes = {}
    for event in _events(trace, "X"):
        span = (event["ts"], event["ts"] + event["dur"])
        lanes.setdefault((event["pid"], event["tid"]), []).append(span)
    return any(
        a[1] > b[0] + 2e-6
        for spans in lanes.values()
        for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False)
    )


def test_trace_has_a_slice_per_instruction_and_lanes_do_not_overlap(times):
    trace = document({"rank 0 core 0": times.timeline, "rank 1 core 0": times.timeline})
    slices = [e for e in _events(trace, "X") if not e["name"].endswith("data")]
    assert len(slices) == 2 * len(times.timeline.program)
    assert not _lanes_overlap(trace)
    assert {e["args"]["name"] for e in _events(trace, "M")} >= {"rank 1 core 0", "tensor", "vector"}
    assert trace["otherData"]["note"] == "estimated, not measured"
    assert json.loads(json.dumps(trace)) == trace


def test_overlapping_slices_are_caught(times):
    trace = document({"rank 0 core 0": times.timeline})
    first = next(e for e in _events(trace, "X") if e["cat"] == "tensor")
    first["dur"] = 1e6
    assert _lanes_overlap(trace)


def test_arrows_come_in_pairs_and_point_forward(times):
    trace = document({"rank 0 core 0": times.timeline})
    starts = {e["id"]: e["ts"] for e in _events(trace, "s")}
    ends = {e["id"]: e["ts"] for e in _events(trace, "f")}
    assert starts.keys() == ends.keys()
    assert starts
    assert all(starts[i] <= ends[i] for i in starts)


def test_counters_return_to_zero_and_bytes_add_up(times):
    trace = document({"rank 0 core 0": times.timeline})
    memory = [e for e in _events(trace, "C") if e["name"].endswith("per partition")]
    assert memory[-1]["args"]["value"] == 0
    rates = [e["args"]["value"] for e in _events(trace, "C") if e["name"] == "HBM GB/s"]
    assert sum(rates) * 1000 == pytest.approx(sum(hbm_bytes(times)), rel=0.01)


def test_profile_table_names_the_slowest_line_and_the_three_times(times):
    text = table(times)
    data = summary(times)
    for key in ("bound_us", "expected_us", "pessimistic_us"):
        assert f"{data[key]:.1f} us" in text
    worst = next(entry for entry in data["critical_path_us"] if entry["line"])
    assert f":{worst['line']}" in text
    assert "not measured" in text


def test_hbm_bytes_of_a_fused_kernel_are_its_inputs_and_output(times):
    read, written = hbm_bytes(times)
    assert read == 3 * 128 * 512 * 2
    assert written == 512 * 128 * 2


@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd"])
def test_profile_and_trace_of_our_kernels(kernel, tmp_path):
    files = [tmp_path / name for name in ("p.json", "roof.png", "line.png", "t.json")]
    text = run_profile(kernel, SMALL, json_path=files[0], roofline=files[1], timeline=files[2])
    assert f"{kernel}.py:" in text
    assert str(files[3]) in run_trace(kernel, SMALL, files[3])
    assert json.loads(files[0].read_text())["generation"] == "gen3"
    assert files[1].read_bytes()[:4] == files[2].read_bytes()[:4] == b"\x89PNG"
    assert json.loads(files[3].read_text())["traceEvents"]


def test_times_never_change_a_result(times):
    before = list(times.timeline.program.log.rows)
    estimate(times.timeline.program.log, "gen2")
    assert list(times.timeline.program.log.rows) == before


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(queries=100, keys=100), "multiples of 128, got 100 and 100"),
        (Block(queries=128, keys=256), "equal lengths under a causal mask"),
        (Block(mask="window"), "expected full, causal or strict, got 'window'"),
        (Block(queries=128, keys=128, dtype="float16"), "expected bfloat16 or float32"),
    ],
)
def test_wrong_blocks_are_caught(block, message):
    with pytest.raises(ValueError, match=message):
        time_block("flash_fwd", block)


def test_a_command_makes_the_folder_of_the_file_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "trace.json"
    command = ["trace", "flash_fwd", "--queries", "128", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["traceEvents"]
