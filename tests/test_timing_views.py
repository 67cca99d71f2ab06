"""Trace, profile and pictures: valid files whose numbers are the timeline's."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from perfetto_reader import read
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.simulators.cluster.cli import Ring, run_simulate
from nxd_cp.simulators.timing import estimate
from nxd_cp.simulators.timing.call import Call, parse_array, parse_option
from nxd_cp.simulators.timing.cli import Block, run_profile, run_trace, time_call
from nxd_cp.simulators.timing.plots import roofline_label, roofline_png
from nxd_cp.simulators.timing.profile import hbm_bytes, summary, table
from nxd_cp.simulators.timing.progress import Progress
from nxd_cp.simulators.timing.streams.attention import attention
from nxd_cp.simulators.timing.trace import document

KERNEL = """
import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def scale(data, factor=1.0, out_dtype="float32"):
    out = nl.ndarray(data.shape, dtype=data.dtype, buffer=nl.shared_hbm)
    width = data.shape[1] // nl.num_programs()
    part = nl.ds(nl.program_id(0) * width, width)
    tile = nl.ndarray((data.shape[0], width), dtype=data.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=data[:, part])
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=factor)
    nisa.dma_copy(dst=out[:, part], src=tile)
    return out
"""


@pytest.fixture(scope="module")
def user_kernel(tmp_path_factory):
    """somebody_kernels.py:scale, in a folder that is not on the path."""
    file = tmp_path_factory.mktemp("kernels") / "somebody_kernels.py"
    file.write_text(KERNEL)
    return f"{file}:scale"


@pytest.fixture(scope="module")
def times():
    return estimate(attention(512, "bfloat16", fused=True), "gen3")


def _events(trace, phase):
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_trace_has_a_slice_per_instruction_and_perfetto_keeps_them_all(times):
    trace = document({"rank 0 core 0": times.timeline, "rank 1 core 0": times.timeline})
    slices, _, dropped = read(trace)
    assert not dropped
    instructions = [e for e in slices if not e["name"].endswith("data")]
    assert len(instructions) == 2 * len(times.timeline.program)
    assert {e["args"]["name"] for e in _events(trace, "M")} >= {"rank 1 core 0", "tensor", "vector"}
    assert trace["otherData"]["note"] == "estimated, not measured"
    assert trace["otherData"]["guess_share"] == {
        name: round(times.guess_share, 4) for name in ("rank 0 core 0", "rank 1 core 0")
    }
    assert json.loads(json.dumps(trace)) == trace


def test_the_wait_of_every_slice_is_the_gap_before_it(times):
    trace = document({"rank 0 core 0": times.timeline})
    begin = times.timeline.program.values.kernel_start / 1e3
    for lane in {e["tid"] for e in _events(trace, "X") if "wait_ns" in e["args"]}:
        free = begin
        for e in sorted(
            (e for e in _events(trace, "X") if e["tid"] == lane), key=lambda e: e["ts"]
        ):
            gap = 1e3 * max(0.0, e["ts"] - free)  # both ends are whole ns
            assert e["args"]["wait_ns"] == pytest.approx(gap, abs=1.001)
            free = e["ts"] + e["dur"]


def _format_errors(trace):
    """What the Trace Event Format does not allow, one line each."""
    found = [] if isinstance(trace.get("traceEvents"), list) else ["no traceEvents"]
    needed = {"X": ("ts", "dur", "tid"), "C": ("ts", "args"), "M": ("args",)}
    needed |= dict.fromkeys("sf", ("ts", "tid", "id", "cat"))
    for event in trace["traceEvents"]:
        kind = event.get("ph")
        if kind not in needed:
            found.append(f"phase {kind}")
            continue
        found += [f"{kind} without {k}" for k in ("name", "pid", *needed[kind]) if k not in event]
        numbers = [event[k] for k in ("ts", "dur") if k in event]
        numbers += list(event["args"].values()) if kind == "C" else []
        if any(isinstance(n, str) or not 0 <= n < float("inf") for n in numbers):
            found.append(f"{kind} with a number that is none: {numbers}")
    return found


def test_a_trace_is_in_the_trace_event_format_and_an_error_in_it_is_caught(times):
    trace = document({"rank 0 core 0": times.timeline})
    assert not _format_errors(trace)
    assert {e["ph"] for e in trace["traceEvents"]} == set("XCMsf")
    counted = {e["name"] for e in _events(trace, "C")}
    assert counted >= {"HBM GB/s", "DMA GB/s", "sbuf bytes per partition"}
    for kind, key, value in (("X", "ts", -1.0), ("s", "id", None), ("C", "args", {"value": "x"})):
        wrong = json.loads(json.dumps(trace))
        event = _events(wrong, kind)[0]
        event[key] = value
        if value is None:
            del event[key]
        assert len(_format_errors(wrong)) == 1


def test_what_perfetto_would_drop_is_caught(times):
    def dropped(phase, key, change):
        trace = document({"rank 0 core 0": times.timeline})
        event = _events(trace, phase)[0]
        event[key] = change(event[key])
        return read(trace)[2]

    assert any("overlaps" in why for why in dropped("X", "dur", lambda dur: dur + 1e-3))
    assert any("ends before it begins" in why for why in dropped("X", "dur", lambda dur: -dur))
    assert any("without a slice" in why for why in dropped("s", "tid", lambda tid: 99))
    assert any("begins nowhere" in why for why in dropped("s", "id", lambda number: number + 1))


def test_an_arrow_leads_from_the_instruction_that_was_waited_for(times):
    _, arrows, _ = read(document({"rank 0 core 0": times.timeline}))
    waits = ("data", "war", "waw", "bank", "space")
    assert len(arrows) == sum(kind in waits for kind in times.timeline.wait_kind) > 10
    for tail, head in arrows:
        assert head["args"]["wait_on"] == tail["args"]["record"]
        assert tail["ts"] <= head["ts"]


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


def test_every_report_on_trn3_says_that_it_is_extrapolated(times):
    third = estimate(times.timeline.program.log, "gen4")
    words = "extrapolated from gen3: no public measurement of trn3 was found"
    assert words in table(third)
    assert words == summary(third)["constants"]
    assert words == document({"core": third.timeline})["otherData"]["constants"]["gen4"]
    assert words in run_simulate(Ring(generation="trn3", ranks=2, seq_len=4096, tflops=500.0))
    assert words not in table(times)


def test_hbm_bytes_of_a_fused_kernel_are_its_inputs_and_output(times):
    read, written = hbm_bytes(times)
    assert read == 3 * 128 * 512 * 2
    assert written == 512 * 128 * 2


@pytest.mark.parametrize("kernel", ["flash_fwd", "flash_bwd"])
def test_profile_and_trace_of_our_kernels(kernel, tmp_path):
    files = [tmp_path / name for name in ("p.json", "roof.png", "line.png", "t.json")]
    block = Block(kernel=kernel, queries=128, keys=128)
    text = run_profile(block, json_path=files[0], roofline=files[1], timeline=files[2])
    assert "critical path by source line" in text
    assert str(files[3]) in run_trace(block, files[3])
    assert json.loads(files[0].read_text())["generation"] == "gen3"
    assert files[1].read_bytes()[:4] == files[2].read_bytes()[:4] == b"\x89PNG"
    assert json.loads(files[3].read_text())["traceEvents"]


def test_any_kernel_is_profiled_on_one_or_more_cores_and_ranks(user_kernel, tmp_path):
    array = ("128x512:bfloat16",)
    one = run_profile(Call(target=user_kernel, arrays=array, options=("factor=2",)))
    assert "somebody_kernels.py:" in one
    assert "3 instructions" in one
    path = tmp_path / "p.json"
    pair = Call(target=user_kernel, arrays=array, lnc=2, ranks=2)
    assert "4 cores, the slowest is rank" in run_profile(pair, json_path=path)
    cores = json.loads(path.read_text())["cores"]
    assert sorted(cores) == [f"rank {r} core {c}" for r in range(2) for c in range(2)]
    assert "4 cores" in run_trace(pair, tmp_path / "t.json")


def test_a_roofline_says_that_a_kernel_without_products_has_no_point(user_kernel, times, tmp_path):
    (scaled,) = time_call(Call(target=user_kernel, arrays=("128x64:float32",))).values()
    assert roofline_label(user_kernel, scaled).startswith(
        "somebody_kernels.py:scale (no products, so no point, estimated, "
    )
    assert "% MFU, estimated" in roofline_label("attention", times)
    roofline_png(tmp_path / "roof.png", {user_kernel: scaled})
    assert (tmp_path / "roof.png").stat().st_size > 1000


def test_timing_a_kernel_prints_what_it_does_on_standard_error(user_kernel, capsys):
    times = time_call(Call(target=user_kernel, arrays=("data=128x64:float32",)))
    said = capsys.readouterr()
    assert not said.out
    assert "simulating" in said.err
    assert "timing 3 instructions" in said.err
    assert list(times) == ["rank 0 core 0"]


def test_a_long_phase_is_reported_while_it_lasts():
    out = io.StringIO()
    with Progress("waiting", every_s=0.01, out=out) as progress:
        time.sleep(0.1)
        progress.say("done")
    lines = out.getvalue().splitlines()
    assert lines[0] == "waiting ..."
    assert "waiting: 0 s" in lines
    assert "done ..." in lines


def test_arrays_and_options_are_read_as_written():
    name, array = parse_array("q=1x128x64:bfloat16")
    assert (name, array.shape, str(array.dtype)) == ("q", (1, 128, 64), "bfloat16")
    assert parse_array("7:int32")[1].shape == (7,)
    assert parse_option("causal=True") == ("causal", True)
    assert parse_option("mask=full") == ("mask", "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": ("128,512:bfloat16",)}, "array: expected SHAPE:DTYPE such as 128x512:bfloat16"),
        ({"arrays": ("128x512:bfloat",)}, "dtype: expected one of NumPy or ml_dtypes"),
        ({"options": ("factor",)}, "option: expected NAME=VALUE, got 'factor'"),
        ({"target": "somewhere"}, "expected flash_fwd, flash_bwd or module:function"),
        ({"target": "json:dumps"}, "expected an @nki.jit function in json, got 'dumps'"),
        ({"generation": "trn9"}, "generation: expected one of trn1"),
        ({}, r"expected arguments \(.*\), got 0 unnamed and \[\].*add --array SHAPE:DTYPE"),
        ({"ranks": 2, "options": ("size=1",)}, "unexpected keyword argument 'size'|missing"),
    ],
)
def test_wrong_calls_are_caught(user_kernel, change, message):
    with pytest.raises(ValueError, match=message):
        time_call(Call(**{"target": user_kernel, **change}))


def test_times_never_change_a_result(times):
    before = list(times.timeline.program.log.rows)
    estimate(times.timeline.program.log, "gen2")
    assert list(times.timeline.program.log.rows) == before


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("flash_fwd", ["--queries", "100"], "multiples of 128, got 100 and 100"),
        ("flash_fwd", ["--keys", "256"], "equal lengths under a causal mask"),
        ("flash_fwd", ["--mask", "window"], "expected one of full, causal, strict, got 'window'"),
        ("flash_fwd", ["--dtype", "float16"], "expected one of bfloat16, float32, got 'float16'"),
        ("flash_fwd", ["--heads", "3", "--kv-heads", "2"], "that divide query heads"),
        ("flash_bwd", ["--head-dim", "257"], "at most 256, got 1 and 1 of dim 257"),
        ("flash", [], "expected flash_fwd, flash_bwd or module:function, got 'flash'"),
    ],
)
def test_wrong_blocks_are_usage_errors(kernel: str, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["profile", kernel, *options])
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"[\s\u2500-\u257f]+", " ", result.output)


def test_a_command_makes_the_folder_of_the_file_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "trace.json"
    command = ["trace", "flash_fwd", "--queries", "128", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["traceEvents"]


def test_a_command_refuses_a_folder_where_a_file_goes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "expected a file"),
        (tmp_path / "file" / "x", "can be written"),
    ):
        result = CliRunner().invoke(app, ["trace", "flash_fwd", "--out", str(out)])
        assert result.exit_code == 2, result.output
        assert message in re.sub(r"[^\w:]+", " ", result.output)


def test_the_commands_take_a_kernel_of_anybody(user_kernel):
    command = ["profile", user_kernel, "--array", "128x512:bfloat16", "--option", "factor=3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "somebody_kernels.py:" in result.output
    bad = CliRunner().invoke(app, ["trace", user_kernel, "--array", "x"])
    assert bad.exit_code == 2
    assert "SHAPE:DTYPE" in bad.output
    bare = CliRunner().invoke(app, ["profile", user_kernel])
    assert bare.exit_code == 2
    assert "expected arguments" in re.sub(r"[^\w:]+", " ", bare.output)


def test_options_that_have_no_effect_are_refused(user_kernel):
    for kernel, *option in (("flash_fwd", "--lnc", "2"), (user_kernel, "--head-dim", "128")):
        result = CliRunner().invoke(app, ["profile", kernel, *option])
        assert result.exit_code == 2, result.output
        assert f"{option[0][2:]}: expected with" in re.sub(r"[^\w:-]+", " ", result.output)


def test_profile_and_trace_have_the_same_options_but_for_what_they_write():
    helps = [CliRunner().invoke(app, [name, "--help"]).output for name in ("profile", "trace")]
    options = [set(re.findall(r"--[a-z-]+", text)) for text in helps]
    assert options[0] - options[1] == {"--json", "--roofline", "--timeline"}
    assert options[1] - options[0] == {"--out"}
