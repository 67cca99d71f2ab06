"""The demo in small: the same losses on any number of ranks, and a report that catches others."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.context import CPContext
from nxd_cp.demo.data import load_text, sample_batch
from nxd_cp.demo.launch import launch
from nxd_cp.demo.main import scheduled_per_step
from nxd_cp.demo.report import (
    FIRST_STEP_BOUND,
    LATER_STEP_BOUND,
    compare,
    failures,
    plot,
    rounding_bound,
    table,
)
from nxd_cp.demo.settings import ModelSettings, RunSettings, Sent, StepRecord
from nxd_cp.demo.train import train
from nxd_cp.schedule import LAYOUTS

TINY = RunSettings(
    name="tiny",
    backend="torch",
    seq_len=48,
    num_steps=4,
    learning_rate=5e-3,
    model=ModelSettings(num_layers=1, model_dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _train(run, num_ranks):
    return CPContext.local(num_ranks, layout=run.layout).run(lambda cp: train(run, cp))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_traffic_on_2_3_and_4_ranks_are_as_promised(layout):
    run = replace(TINY, layout=layout)
    by_ranks = {n: _train(run, n) for n in (1, 2, 3, 4)}
    for records in by_ranks.values():
        losses = {tuple(record.loss for record in rank) for rank in records}
        assert len(losses) == 1, "ranks differ about the loss"
    scheduled = {n: scheduled_per_step(run, n) for n in by_ranks}
    rows = compare(run, {n: records[0] for n, records in by_ranks.items()}, scheduled)
    assert failures(rows, FIRST_STEP_BOUND, LATER_STEP_BOUND) == []


def test_local_position_ids_are_caught(monkeypatch):
    def forget(batch, cp):
        part = shard_batch(batch, cp)
        part["position_ids"] = torch.arange(part["input_ids"].shape[1])[None]
        return part

    from nxd_cp.demo import train as module

    shard_batch = module.shard_batch
    one = _train(TINY, 1)[0]
    monkeypatch.setattr(module, "shard_batch", forget)
    wrong = _train(TINY, 2)[0]
    rows = compare(TINY, {1: one, 2: wrong}, {n: scheduled_per_step(TINY, n) for n in (1, 2)})
    assert any("loss off by" in found for found in failures(rows, 1e-6, 1e-5))


def test_batches_depend_on_seed_and_step_alone():
    text = load_text()
    assert len(text) > 300_000
    first = sample_batch(text, 64, step=3, seed=0)["input_ids"]
    assert torch.equal(first, sample_batch(text, 64, step=3, seed=0)["input_ids"])
    assert not torch.equal(first, sample_batch(text, 64, step=4, seed=0)["input_ids"])
    assert not torch.equal(first, sample_batch(text, 64, step=3, seed=1)["input_ids"])
    with pytest.raises(ValueError, match="expected seq_len of at most 10"):
        sample_batch(b"0123456789", 11, step=0, seed=0)


def test_torchrun_workers_report_every_step(tmp_path):
    seen = []
    records = launch([TINY], 2, tmp_path, lambda name, record: seen.append((name, record.step)))
    assert seen == [("tiny", step) for step in range(4)]
    one, two = _train(TINY, 1)[0], records["tiny"]
    rows = compare(TINY, {1: one, 2: two}, {n: scheduled_per_step(TINY, n) for n in (1, 2)})
    assert failures(rows, FIRST_STEP_BOUND, LATER_STEP_BOUND) == []


def test_a_failing_worker_ends_in_an_error_that_shows_its_output(tmp_path):
    with pytest.raises(RuntimeError, match=r"expected one of .* got 'spiral'"):
        launch([replace(TINY, layout="spiral")], 1, tmp_path)


def _records(losses, sent=Sent(2, 100)):
    return [StepRecord(i, loss, 0.5, sent) for i, loss in enumerate(losses)]


def _failures(losses, sent=Sent(2, 100)):
    by_ranks = {1: _records([5.0, 4.0, 3.0]), 2: _records(losses, sent)}
    rows = compare(TINY, by_ranks, {1: Sent(2, 100), 2: Sent(2, 100)})
    return failures(rows, FIRST_STEP_BOUND, LATER_STEP_BOUND)


def test_equal_runs_pass_the_report():
    assert _failures([5.0, 4.0, 3.0]) == []
    assert _failures([5.0 + 4e-6, 4.0 + 3e-5, 3.0]) == []


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([5.0 + 6e-6, 4.0, 3.0], "first loss off by"),
        ([5.0, 4.0 + 5e-5, 3.0], "later loss off by"),
        ([5.0, float("nan"), 3.0], "later loss off by"),
        ([float("nan"), 4.0, 3.0], "first loss off by"),
        ([5.0, 4.0, 5.0], "did not fall"),
    ],
)
def test_wrong_losses_are_caught(losses, found):
    assert any(found in text for text in _failures(losses))


def test_a_wrong_number_of_bytes_or_messages_is_caught():
    assert any("the schedule says" in x for x in _failures([5.0, 4.0, 3.0], Sent(2, 99)))
    assert any("the schedule says" in x for x in _failures([5.0, 4.0, 3.0], Sent(1, 100)))


def test_rounding_bound_follows_the_drift_and_has_a_floor():
    plain = _records([5.0, 4.0])
    assert rounding_bound(plain, plain) == (2.0**-22, 2.0**-22)
    first, later = rounding_bound(plain, _records([5.0 + 5e-6, 4.0 + 8e-6]))
    assert first == pytest.approx(4e-6)
    assert later == pytest.approx(8e-6)


def test_rounding_run_differs_from_the_plain_one_by_little():
    plain, moved = _train(TINY, 1)[0], _train(replace(TINY, rounding_seed=1), 1)[0]
    drift = [abs(a.loss - b.loss) / b.loss for a, b in zip(moved, plain, strict=True)]
    assert 0 < max(drift) < LATER_STEP_BOUND


def test_table_and_plot_are_made(tmp_path):
    sent = Sent(2, 5_244_160)
    by_ranks = {n: [replace(r, seconds=0.1) for r in _records([5.0, 4.0], sent)] for n in (1, 2)}
    rows = compare(replace(TINY, seq_len=10_000), by_ranks, {1: sent, 2: sent})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(TINY, rows, 1e-6, 1e-5))
    text = console.export_text()
    assert text.count("2 = 2") == 2
    assert chr(0x2026) not in text, "a column was cut off at 80 characters"
    plot([(TINY, by_ranks)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("off_by", [0.0, 1e-3])
def test_demo_command_exits_with_1_when_a_loss_is_off(tmp_path, monkeypatch, off_by):
    def pretend(runs, num_ranks, out, on_step):
        losses = [5.0, 4.0 + off_by * (num_ranks == 4), 3.0]
        return {r.name: _records(losses, scheduled_per_step(r, num_ranks)) for r in runs}

    monkeypatch.setattr("nxd_cp.demo.main.launch", pretend)
    arguments = ["demo", "--steps", "3", "--simulate-steps", "3", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (1 if off_by else 0), result.output
    assert ("4 ranks: later loss off by" in result.output) == bool(off_by)
    assert (tmp_path / "loss.png").exists()


def test_plan_command_prints_the_plan():
    result = CliRunner().invoke(app, ["plan", "--layout", "zigzag", "--ranks", "4"])
    assert result.exit_code == 0
    assert result.output.startswith("zigzag, 4 ranks")
    assert result.output.count("causal") > 4


def test_plan_command_refuses_a_length_that_is_none():
    result = CliRunner().invoke(app, ["plan", "--ranks", "4", "--seq-len", "0"])
    assert result.exit_code == 2
    assert "--seq-len" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "100"], "got 100"),
        (["--seq-len", "12"], "multiple of 8"),
        (["--seq-len", "8000000"], "bytes, got 8000000"),
        (["--simulate-seq-len", "300"], "multiple of 8"),
        (["--simulate-steps", "1"], "0 or at least 2"),
    ],
)
def test_demo_command_refuses_before_any_training(options, message, tmp_path):
    result = CliRunner().invoke(app, ["demo", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_demo_command_names_a_missing_package_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr("nxd_cp.demo.main.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "expected matplotlib to be installed" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["demo"], ["plan"]])
def test_help_describes_every_command(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
