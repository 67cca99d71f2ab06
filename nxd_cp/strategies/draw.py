"""A picture of the strategies of one shape: work per rank and step, and what each costs.

Does: draw `cost.compare`'s figures with matplotlib. Does not: compute them.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nxd_cp.strategies.cost import Cost

MIB = 2**20
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#2e4057")

matplotlib.use("Agg")


def draw(costs: list[Cost], title: str, path: Path) -> None:
    """Write a PNG. costs: as from `compare`, the strategy that is taken first."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    _work(figure.add_subplot(grid[0, :]), costs[0])
    names = [str(cost.work.strategy) for cost in costs]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(costs))]
    _bars(
        figure.add_subplot(grid[1, 0]),
        names,
        [cost.seconds * 1e3 for cost in costs],
        colours,
        "estimated ms, forward + backward",
    )
    _messages(figure.add_subplot(grid[1, 1]), names, costs)
    _bars(
        figure.add_subplot(grid[1, 2]),
        names,
        [cost.buffer_bytes / MIB for cost in costs],
        colours,
        "buffers of a rank, MiB",
    )
    figure.suptitle(f"{title}; taken: {names[0]}")
    figure.savefig(path, dpi=110)


def _work(axes: Axes, cost: Cost) -> None:
    """Stacked bars: the pairs that each rank computes, step by step."""
    plan = cost.work.plan
    bottoms = [0.0] * plan.size
    shades = matplotlib.colormaps["viridis"].resampled(max(plan.num_steps, 2))
    for index in range(plan.num_steps):
        pairs = [steps[index].num_pairs / 1e6 for steps in plan.steps]
        axes.bar(
            range(plan.size),
            pairs,
            bottom=bottoms,
            color=shades(index),
            edgecolor="white",
            linewidth=0.5,
            label=f"step {index}",
        )
        bottoms = [below + more for below, more in zip(bottoms, pairs, strict=True)]
    axes.axhline(sum(bottoms) / plan.size, color="black", linewidth=0.8, linestyle="--")
    ways = f", for 1/{cost.work.ways} of the heads" if cost.work.ways > 1 else ""
    axes.set_title(f"{cost.work.strategy}: work per rank{ways}; dashed: mean", fontsize=10)
    axes.set_ylabel("million (query, key) pairs")
    axes.set_xlabel("rank")
    axes.set_xticks(range(plan.size))
    if plan.num_steps <= 16:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _bars(
    axes: Axes, names: list[str], values: list[float], colours: list[str], title: str
) -> None:
    bars = axes.bar(names, values, color=colours)
    axes.bar_label(bars, [_short(value) for value in values], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.15)
    axes.tick_params(axis="x", labelsize=8)


def _messages(axes: Axes, names: list[str], costs: list[Cost]) -> None:
    """Bytes of one message of each kind, side by side."""
    kinds = ("keys and values", "their gradients", "heads exchanged")
    width = 0.27
    for index, kind in enumerate(kinds):
        sizes = [cost.hop_bytes[index] / MIB for cost in costs]
        places = [place + (index - 1) * width for place in range(len(costs))]
        bars = axes.bar(places, sizes, width, label=kind, color=COLOURS[index])
        axes.bar_label(bars, [_short(size) if size else "" for size in sizes], fontsize=7)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_title("largest message of each kind, MiB", fontsize=10)
    axes.margins(y=0.25)
    axes.legend(fontsize=7)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
