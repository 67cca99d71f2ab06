"""The kernel benchmark: labelled times, no speed for a wrong kernel, comparisons that notice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.bench import numerics
from nxd_cp.bench.cases import Case, preset, sweep
from nxd_cp.bench.compare import compare
from nxd_cp.bench.device import HostClockTimer, percentiles, time_neff, waiter
from nxd_cp.bench.implementations import NxdKernels, OurKernels, nxd_kernels
from nxd_cp.bench.plots import plot
from nxd_cp.bench.report import Report, Row, Times, markdown, text
from nxd_cp.bench.run import Plan, run
from nxd_cp.bench.simulated import SimulatedTimer, peak_tflops
from nxd_cp.cli import app

SMALL = sweep(lengths=(128,), head_dims=(32,))


class Wrong(TorchBackend):
    """PyTorch's flash attention with a planted fault in the output, or in dk."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.fault == "raises":
            raise RuntimeError("compiler error NCC_000")
        o, lse = super().forward(*args, **options)
        o = o.clone()
        o[0, 0, 3, 5] += 0.5 if self.fault == "value" else 0.0
        o[0, 0, 3, 5] = torch.nan if self.fault == "nan" else o[0, 0, 3, 5]
        return o, lse

    def backward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*args, **options)
        return (dq, dv, dk) if self.fault == "swapped" else (dq, dk, dv)


class Clock:
    """A timer that must not be asked about a wrong kernel."""

    source = "measured"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def time(self, case: Case, implementation: Any) -> Times:
        self.asked.append(str(case))
        return percentiles([10.0, 20.0])


def _run(implementation: Any, cases: list[Case], timer: Any = None) -> Report:
    return run(Plan("trn1", cases, [implementation], timer or Clock(), 91.75))


def test_flops_are_those_of_visible_pairs() -> None:
    full = Case(mask="full", queries=256, keys=512, num_heads=4, num_kv_heads=2, head_dim=64)
    assert full.flops == 4 * 64 * 4 * 256 * 512
    assert Case(kernel="flash_bwd", queries=128, keys=128).num_pairs == 128 * 129 / 2
    assert Case(mask="strict", queries=128, keys=128).num_pairs == 128 * 127 / 2
    assert Case(kernel="flash_bwd").flops == 2.5 * Case().flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "matmul"}, "kernel: expected one of"),
        ({"mask": "window"}, "mask: expected one of"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"queries": 100}, "multiples of 128"),
        ({"queries": 256, "keys": 512}, "equal lengths under a causal mask"),
        ({"num_heads": 3, "num_kv_heads": 2}, "that divide query heads"),
        ({"num_heads": 0}, "that divide query heads"),
    ],
)
def test_cases_that_no_kernel_takes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**options)


def test_presets_have_the_number_of_cases_that_the_help_names() -> None:
    assert [len(preset(name)) for name in ("quick", "standard", "wide")] == [4, 20, 40]
    with pytest.raises(ValueError, match="preset: expected quick"):
        preset("all")


def test_the_simulated_kernels_pass_and_their_times_are_ordered_and_labelled() -> None:
    ours = OurKernels(KernelBackend("simulate", "gen2"))
    report = _run(ours, SMALL, SimulatedTimer("trn1"))
    assert report.refused == []
    assert len(report.rows) == 4
    for row in report.rows:
        assert row.times is not None
        us = row.times.us
        assert 0 < us["bound"] <= us["expected"] <= us["pessimistic"]
        assert 0 < (report.mfu(row) or 0) < 1
    for shown in (text(report), markdown(report)):
        assert "SIMULATED: estimated from instructions, not measured" in shown
        assert "p50" not in shown


def test_two_cores_share_the_heads_of_a_launch() -> None:
    case = Case(queries=128, keys=128, num_heads=2, num_kv_heads=2, head_dim=32)
    times = []
    for cores in (1, 2):
        ours = OurKernels(KernelBackend("simulate", "gen3", cores=cores), cores)
        assert numerics.check(case, ours).passed
        times.append(SimulatedTimer("trn2").time(case, ours).us["expected"])
    assert times[1] < times[0]
    odd = replace(case, num_heads=1, num_kv_heads=1)
    assert "LNC 2 needs" in ours.refuses(odd)
    assert ours.refuses(odd.with_heads(2)) == ""
    assert peak_tflops("trn2", 2) == 2 * peak_tflops("trn2")


def test_the_peak_is_that_of_the_documented_clock() -> None:
    assert peak_tflops("trn1") == pytest.approx(2 * 128 * 128 * 2.8e9 / 1e12)
    assert peak_tflops("inf2") == peak_tflops("trn1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mask", ["full", "causal", "strict"])
def test_a_right_kernel_passes_its_numerics(mask: str, dtype: str) -> None:
    for kernel in ("flash_fwd", "flash_bwd"):
        case = Case(kernel, 256, 256, mask, 2, 1, 32, dtype)
        assert numerics.check(case, OurKernels(TorchBackend())).passed


@pytest.mark.parametrize("fault", ["value", "nan", "raises", "swapped"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_wrong_kernel_has_no_speed_anywhere(fault: str, dtype: str, tmp_path: Path) -> None:
    kernel = "flash_bwd" if fault == "swapped" else "flash_fwd"
    wrong, right = Case(kernel, 128, 128, dtype=dtype), Case(kernel, 256, 256, dtype=dtype)
    clock = Clock()
    report = _run(OurKernels(Wrong(fault)), [wrong, right], clock)
    assert clock.asked == []
    assert len(report.refused) == 2
    assert [report.mfu(row) for row in report.rows] == [None, None]
    for shown in (text(report), markdown(report)):
        lines = [line for line in shown.splitlines() if "FAILED: no speed" in line]
        assert len(lines) == 2
        assert not any(word in line for line in lines for word in ("10.0", "20.0", "%"))
    report.write(tmp_path / "bench.json")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["times"] for row in rows] == [None, None]


def test_one_wrong_kernel_does_not_hide_the_others() -> None:
    report = _run(OurKernels(Wrong("swapped")), SMALL)
    assert [row.passed for row in report.rows] == [True, True, False, False]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = _run(OurKernels(Wrong("swapped")), SMALL)
    report.write(tmp_path / "bench.json")
    assert Report.read(tmp_path / "bench.json") == report
    (tmp_path / "other.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="expected a report of nxd-cp bench"):
        Report.read(tmp_path / "other.json")


def _report(times: dict[str, float | None], source: str = "measured") -> Report:
    rows = [
        Row(
            case,
            "s",
            128,
            "nxd-cp",
            1e9,
            "",
            us is not None,
            Times("p50", {"p50": us}) if us else None,
        )
        for case, us in times.items()
    ]
    return Report("trn1", source, 91.75, {}, rows)


def test_a_comparison_notices_slower_gone_and_wrong() -> None:
    before = _report({"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0, "e": 100.0, "f": None})
    after = _report({"a": 104.0, "b": 106.0, "c": 90.0, "d": None, "f": 50.0, "g": 1.0})
    found = {x.case.split()[0]: (x.verdict, x.bad) for x in compare(before, after, 0.05)}
    assert found == {
        "a": ("same", False),
        "b": ("slower", True),
        "c": ("faster", False),
        "d": ("now fails its numerics check", True),
        "e": ("gone", True),
        "f": ("passes now", False),
        "g": ("new", False),
    }


def test_simulated_and_measured_runs_are_not_compared() -> None:
    one = _report({"a": 100.0})
    for other in (_report({"a": 100.0}, "simulated"), replace(one, target="trn2")):
        with pytest.raises(ValueError, match="one target and source"):
            compare(one, other, 0.05)
    with pytest.raises(ValueError, match="at least 0"):
        compare(one, one, -0.1)


def test_percentiles_are_by_nearest_rank() -> None:
    found = percentiles([float(x) for x in range(100, 0, -1)]).us
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "min": 1.0, "max": 100.0}
    assert set(percentiles([7.0]).us.values()) == {7.0}


def test_the_host_clock_waits_for_every_launch_and_drops_the_warm_up() -> None:
    waits: list[int] = []
    timer = HostClockTimer("cpu", lambda: waits.append(1), warmup=2, repeats=5)
    found = timer.time(Case(queries=128, keys=128, head_dim=16), OurKernels(TorchBackend()))
    assert len(waits) == 7
    assert found.note.startswith("5 samples")
    assert found.us["min"] > 0


def test_each_stack_is_waited_for_in_its_own_way() -> None:
    calls: list[str] = []
    xla = {
        "torch_xla": SimpleNamespace(sync=lambda: calls.append("sync")),
        "torch_xla.core.xla_model": SimpleNamespace(wait_device_ops=lambda: calls.append("wait")),
    }
    waiter("xla", xla.__getitem__)()
    neuron = SimpleNamespace(synchronize=lambda: calls.append("synchronize"))
    native = {"torch_neuronx": None, "torch": SimpleNamespace(neuron=neuron)}
    waiter("neuron", native.__getitem__)()
    assert calls == ["sync", "wait", "synchronize"]
    with pytest.raises(ValueError, match='expected "xla" or "neuron"'):
        waiter("cpu")


class NeffModel:
    """nrtpy.NrtpyModel, by its page in the SDK's documentation."""

    calls: ClassVar[list[tuple[int, int, str]]] = []

    @classmethod
    def load_from_neff(cls, path: str) -> NeffModel:
        assert path == "kernel.neff"
        return cls()

    def benchmark(
        self, inputs: dict[str, Any], outputs: Any = None, warmup_iter: int = 5,
        benchmark_iter: int = 5, mode: str = "device",
    ) -> Any:  # fmt: skip
        assert inputs == {"q": ("q", 3)}
        self.calls.append((warmup_iter, benchmark_iter, mode))
        return SimpleNamespace(mean_ms=0.25)


def test_a_neff_is_timed_by_nrtpy_one_execution_per_sample() -> None:
    tensor = SimpleNamespace(from_numpy=lambda x, name: (name, len(x)))
    nrtpy = SimpleNamespace(NrtpyModel=NeffModel, NrtpyTensor=tensor)
    found = time_neff(
        Path("kernel.neff"), {"q": np.zeros(3)}, warmup=4, repeats=3, load=lambda name: nrtpy
    )
    assert found.us["p50"] == 250.0
    assert NeffModel.calls == [(4, 1, "device"), (0, 1, "device"), (0, 1, "device")]
    with pytest.raises(ValueError, match=r"expected nrtpy \(Neuron 2.32 or newer\)"):
        time_neff(Path("kernel.neff"), {})


def _nxd_flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    assert options.pop("transpose_nki_inputs") is False
    assert options.pop("lnc", 1) == 1
    assert q.shape == k.shape, "NxD wants key/value heads repeated"
    return F.scaled_dot_product_attention(q, k, v, is_causal=options.pop("causal"))


def _nxd_ring(q: Tensor, k: Tensor, v: Tensor, rank: int, pairs: Any, *, causal: bool) -> Tensor:
    assert (rank, pairs) == (0, [(0, 0)])
    return _nxd_flash(q, k, v, causal=causal, transpose_nki_inputs=False)


def test_nxds_kernels_are_a_baseline_where_they_can_be_imported() -> None:
    module = SimpleNamespace(nki_flash_attn_func=_nxd_flash, nki_ring_attn_func=_nxd_ring)
    found, notes = nxd_kernels(lambda name: module)
    assert [one.name for one in found] == ["nxd flash", "nxd ring"]
    assert notes == []
    for kernel in ("flash_fwd", "flash_bwd"):
        case = Case(kernel, 1024, 1024, "causal", 2, 1, 16)
        assert found[1].refuses(case) == ""
        assert numerics.check(case, found[1]).passed
    assert "multiple of 2048" in found[0].refuses(Case())
    pair, notes = nxd_kernels(lambda name: module, cores=2)
    assert [one.name for one in pair] == ["nxd flash"]
    assert notes == ["baseline nxd ring: not timed, it has no LNC 2"]
    assert "no strict mask" in found[1].refuses(Case(mask="strict"))


def test_what_a_baseline_refuses_is_noted_and_not_timed() -> None:
    clock = Clock()
    report = _run(NxdKernels("nxd flash", lambda q, k, v, causal: q, 2048), [Case()], clock)
    assert report.rows == []
    assert clock.asked == []
    assert report.notes == ["nxd flash takes equal lengths of a multiple of 2048"]


def test_without_nxd_the_report_says_why_there_is_no_baseline() -> None:
    found, notes = nxd_kernels()
    assert found == []
    assert [note.split(":")[0] for note in notes] == ["baseline nxd flash", "baseline nxd ring"]


def test_a_picture_is_drawn_of_either_source(tmp_path: Path) -> None:
    for index, report in enumerate(
        (_run(OurKernels(TorchBackend()), SMALL), _run(OurKernels(Wrong("raises")), SMALL))
    ):
        path = tmp_path / f"{index}.png"
        plot(report, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_a_report_and_compares_it(tmp_path: Path) -> None:
    arguments = ["bench", "--target", "trn1", "--lengths", "128", "--head-dims", "32"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "trn1, SIMULATED" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    path = str(tmp_path / "bench.json")
    same = CliRunner().invoke(app, ["bench", "compare", path, path])
    assert same.exit_code == 0, same.output
    data = json.loads(Path(path).read_text())
    data["rows"][0]["times"]["us"]["expected"] *= 2
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(data))
    worse = CliRunner().invoke(app, ["bench", "compare", path, str(slower)])
    assert worse.exit_code == 1
    assert "slower" in worse.output


def test_the_command_fails_for_a_wrong_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = KernelBackend.forward
    monkeypatch.setattr(
        KernelBackend,
        "forward",
        lambda self, q, k, v, **options: tuple(1.1 * x for x in right(self, q, k, v, **options)),
    )
    arguments = ["bench", "--lengths", "128", "--head-dims", "32", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "FAILED: no speed" in done.output


def test_the_command_refuses_a_device_that_is_not_there_and_bad_shapes() -> None:
    for arguments in (["--clock", "device"], ["--lengths", "100"], ["--lengths", "x"]):
        assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "full"], "--masks: expected --lengths with it, got none"),
        (["--preset", "quick", "--lengths", "128"], "--preset: expected a preset or --lengths"),
        (["--lengths", "128,long"], "lengths: expected numbers as 512,1024, got '128,long'"),
        (["--lengths", "128", "--heads", "4"], "heads: expected query:kv heads as 4:1, got '4'"),
    ],
)
def test_sweeps_that_make_no_sense_are_usage_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace(chr(0x2502), " ").split())


def test_the_script_is_the_command() -> None:
    script = Path(__file__).parent.parent / "scripts" / "bench_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert "compare before.json after.json" in done.stdout


def test_the_help_tells_a_newcomer_what_to_type() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"]).output
    assert "nxd-cp bench --target trn1" in shown
    assert "compare before.json after.json" in shown
