"""What `bench_peers.py` found: lines as they come, a JSON, a picture, and whether limits are met.

Does not: measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers.measure import Problem

CORRECT = 1e-4  # largest error of a gradient that counts as right, unit-variance inputs
COLOURS = {"ours": "#1b6ca8", "torch": "#d1495b", "lucidrains": "#edae49", "jax": "#66a182"}
Row = dict[str, Any]

matplotlib.use("Agg")


class Results:
    """All figures. times and memory: one row per problem, mode and library."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self.errors: list[Row] = []
        self.times: list[Row] = []
        self.memory: list[Row] = []
        self.window: Row = {}

    def add_errors(self, problem: Problem, name: str, errors: dict[str, float]) -> None:
        """Largest errors against fp64."""
        if not any(one["problem"] == problem.name for one in self.errors):
            self._line(f"\nlargest error against fp64, {problem.name}, S {problem.seq_len}:")
        right = max(errors.values()) <= CORRECT
        self.errors.append({"problem": problem.name, "name": name, "right": right, **errors})
        text = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
        self._line(f"  {name:<16} {text}{'' if right else '   WRONG'}")

    def is_right(self, problem: str, name: str) -> bool:
        """Its gradients were right."""
        return all(
            one["right"] for one in self.errors if (one["problem"], one["name"]) == (problem, name)
        )

    def add_times(self, problem: Problem, mode: str, times: dict[str, list[float]]) -> None:
        """Seconds of each round, of every library."""
        rounds = len(times["ours"])
        self._line(f"\n{problem.name}, S {problem.seq_len}, {mode}: median of {rounds} rounds")
        for name, seconds in times.items():
            ratio = median(a / b for a, b in zip(times["ours"], seconds, strict=False))
            right = self.is_right(problem.name, name)
            is_rival = not name.startswith("ours") and (right or mode == "forward")
            self.times.append(
                _row(problem, mode, name)
                | {"seconds": median(seconds), "ratio": ratio, "rival": is_rival}
            )
            few = f"   ({len(seconds)} round)" if len(seconds) < rounds else ""
            self._line(
                f"  {name:<16} {median(seconds):8.3f} s   ours / this {ratio:.3f}{few}"
                f"{'' if right else '   (gradients wrong)'}"
            )

    def add_window(self, problem: Problem, window: int, ratio: float) -> None:
        """Causal over windowed time."""
        self.window = _row(problem, "forward + backward", "ours") | {"ratio": ratio}
        self._line(f"\n{problem.name}, S {problem.seq_len}: causal / window {window} = {ratio:.2f}")

    def add_memory(self, problem: Problem, mode: str, name: str, rise: float) -> None:
        """MiB by which the resident set of the worse rank rose."""
        self.memory.append(_row(problem, mode, name) | {"mib": rise})
        self._line(f"rise, {problem.name}, S {problem.seq_len}, {mode}: {name:<16} {rise:8.1f} MiB")

    def meets(self, at_most: float, window_at_least: float, memory_at_most: float) -> bool:
        """Whether all limits are kept; says by how much."""
        slowest = max((one["ratio"] for one in self.times if one["rival"]), default=0.0)
        ratios = self.memory_ratios()
        largest = max(ratios.values(), default=0.0)
        right = all(one["right"] for one in self.errors if one["name"] == "ours")
        for (problem, seq_len), ratio in ratios.items():
            self._line(f"forward memory over PyTorch's, {problem}, S {seq_len}: {ratio:.2f}")
        self._line(
            f"\nworst row: ours / best correct peer {slowest:.3f} (limit {at_most}); window "
            f"{self.window['ratio']:.2f} (limit {window_at_least}); forward memory over PyTorch's "
            f"{largest:.2f} (limit {memory_at_most}); our gradients {'right' if right else 'WRONG'}"
        )
        fast = slowest <= at_most and self.window["ratio"] >= window_at_least
        return fast and largest <= memory_at_most and right

    def memory_ratios(self) -> dict[tuple[str, int], float]:
        """Our forward growth over the smaller one of PyTorch's, by problem and length."""
        rows = [one for one in self.memory if one["mode"] == "forward"]
        found = {}
        for ours in (one for one in rows if one["name"] == "ours"):
            at = ours["problem"], ours["seq_len"]
            same = [one for one in rows if (one["problem"], one["seq_len"]) == at]
            torchs = [one["mib"] for one in same if one["name"].startswith("torch")]
            if torchs:
                found[at] = ours["mib"] / min(torchs)
        return found

    def write(self, path: Path, machine: str) -> None:
        """All figures as JSON."""
        figures = {"machine": machine, "window": self.window}
        figures |= {"errors": self.errors, "times": self.times, "memory": self.memory}
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    def draw(self, path: Path, machine: str) -> None:
        """Times and memory, a row of bars per problem and mode."""
        figure = Figure(figsize=(12, 8), layout="constrained")
        grid = figure.subplots(2, 2)
        problems = list(dict.fromkeys(one["problem"] for one in self.times))
        for column, problem in enumerate(problems[:2]):
            times = [one for one in self.times if one["problem"] == problem]
            both = [one for one in times if one["mode"] != "forward"]
            _bars(grid[0][column], both, "seconds", f"{problem}, forward + backward, s")
            rows = [one for one in self.memory if one["problem"] == problem]
            forward = [one for one in rows if one["mode"] == "forward"]
            _bars(grid[1][column], forward, "mib", f"{problem}, forward, rise of a rank, MiB")
        figure.suptitle(f"two gloo ranks of one thread, causal, fp32; {machine}", fontsize=10)
        figure.savefig(path, dpi=110)

    def _line(self, text: str) -> None:
        self._say(text, highlight=False, markup=False, soft_wrap=True)


def _row(problem: Problem, mode: str, name: str) -> Row:
    return {"problem": problem.name, "seq_len": problem.seq_len, "mode": mode, "name": name}


def _bars(axes: Axes, rows: list[Row], value: str, title: str) -> None:
    """Groups of bars by length, one colour per library; wrong gradients are hatched."""
    lengths = sorted({one["seq_len"] for one in rows})
    names = list(dict.fromkeys(one["name"] for one in rows))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        mine = {one["seq_len"]: one for one in rows if one["name"] == name}
        wrong = any(not one.get("rival", True) and name != "ours" for one in mine.values())
        bars = axes.bar(
            [place + index * width for place in range(len(lengths))],
            [mine[length][value] if length in mine else 0.0 for length in lengths],
            width,
            label=name + (" (gradients wrong)" if wrong else ""),
            color=COLOURS[name.split("-")[0]],
            alpha=0.6 if name.endswith("allgather") else 1.0,
            hatch="//" if wrong else None,
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(lengths))])
    axes.set_xticklabels([f"S {length}" for length in lengths])
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
