"""The benchmark of the simulator compares equal arithmetic and fails when a goal is missed."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_simulator.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_simulator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["bench_simulator.py"])
    monkeypatch.setattr(module.best, "__defaults__", (1,))
    return module


@pytest.mark.parametrize(("goal", "code"), [(1e9, 0), (0.0, 1)])
def test_the_exit_code_says_whether_the_goals_are_reached(bench, monkeypatch, capsys, goal, code):
    monkeypatch.setattr(bench, "GOALS", {"stream": goal, "shape_only": 0, "attention_cte_s": 5.0})
    assert bench.main() == code
    shown = capsys.readouterr().out
    assert "times (goal" in shown
    assert "instructions/s" in shown
    assert "attention_cte   skipped" in shown


def test_different_arithmetic_is_caught(bench, monkeypatch):
    monkeypatch.setattr(bench, "bare", lambda a, b: a)
    with pytest.raises(AssertionError, match="different things"):
        bench.measure_stream()
