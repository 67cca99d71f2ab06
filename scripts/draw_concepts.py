"""Draw the pictures of docs/concepts.md and docs/traces.md from schedules and simulated runs.

    python scripts/draw_concepts.py [FOLDER]        default: docs/images

Needs the extras `plot` and `sim`. Each picture says what it was drawn from.
"""

import sys
from pathlib import Path

import numpy as np
import this_clone  # noqa: F401
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nxd_cp.integrations.nxd.mesh import context_groups, tensor_groups
from nxd_cp.schedule import LAYOUTS, Plan, make_plan, token_runs
from nxd_cp.simulators.cluster.kernel_time import Rate
from nxd_cp.simulators.cluster.ring import Model, RingTimes, simulate
from nxd_cp.simulators.cluster.topology import Cluster
from nxd_cp.simulators.timing.cli import Block, time_call
from nxd_cp.simulators.timing.plots import timeline_png

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
RANKS, TOKENS = 4, 64
SUSTAINED_TFLOPS = 300.0
LONG, SHORT = 65536, 2048


def grid(path: Path) -> None:
    """TP2 x CP2 on four devices: which heads and which part of the sequence each holds."""
    size, tp = 4, 2
    tensors = tensor_groups(size, tp, chip="trn1", lnc=1)
    contexts = context_groups(size, tp, 2, chip="trn1", lnc=1)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for device in range(size):
        row = next(i for i, group in enumerate(tensors) if device in group)
        column = next(i for i, group in enumerate(contexts) if device in group)
        cp_rank = contexts[column].index(device)
        axes.add_patch(
            Rectangle((column + 0.1, row + 0.15), 0.8, 0.7, color=COLOURS[column], alpha=0.25)
        )
        text = f"device {device}\nheads: half {column}\nsequence: part {cp_rank}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11)
    for column, group in enumerate(contexts):
        axes.annotate(
            "", (column + 0.5, 1.14), (column + 0.5, 0.86), arrowprops={"arrowstyle": "<->"}
        )
        label = f"CP group {group}:\nkeys and values go round"
        axes.text(column + 0.53, 1.0, label, va="center", fontsize=8)
    for row, group in enumerate(tensors):
        axes.annotate("", (1.12, row + 0.5), (0.88, row + 0.5), arrowprops={"arrowstyle": "<->"})
        axes.text(2.0, row + 0.5, f"TP group {group}", va="center", fontsize=8)
    axes.set(xlim=(0, 2.5), ylim=(2, 0))
    axes.set_axis_off()
    axes.set_title("TP2 x CP2: tensor parallelism is innermost (drawn from the group lists)")
    figure.savefig(path, dpi=110)


def ring_steps(path: Path) -> None:
    """The score matrix at each step of a zigzag ring, coloured by the rank that computes."""
    plan = make_plan("zigzag", RANKS, TOKENS, causal=True)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, plan.num_steps, sharey=True)
    before = np.zeros((TOKENS, TOKENS), dtype=int)
    for index, axes in enumerate(panels):
        now = _who(plan, index)
        shown = np.where(now > 0, now, before)
        axes.imshow(shown, cmap=_colour_map(), vmin=-1, vmax=RANKS, interpolation="none")
        before[now > 0] = -1
        owners = ", ".join(str(plan.steps[rank][index].owner) for rank in range(RANKS))
        axes.set_title(f"step {index}: ranks 0-3 hold\nthe keys of {owners}", fontsize=10)
        axes.set_xlabel("key")
    panels[0].set_ylabel("query")
    handles = [Patch(color=COLOURS[rank], label=f"rank {rank}") for rank in range(RANKS)]
    handles.append(Patch(color="0.85", label="computed at an earlier step"))
    figure.legend(handles=handles, loc="outside lower center", ncols=RANKS + 1)
    figure.savefig(path, dpi=110)


def _who(plan: Plan, index: int) -> np.ndarray:
    """[S, S]: 1 + the rank that computes each score at step `index`, else 0; global order."""
    order = [
        [token for run in token_runs(plan.layout, plan.size, rank, plan.seq_len) for token in run]
        for rank in range(plan.size)
    ]
    who = np.zeros((plan.seq_len, plan.seq_len), dtype=int)
    for rank in range(plan.size):
        step = plan.steps[rank][index]
        for tile in step.tiles:
            for q in order[rank][tile.q]:
                for k in order[step.owner][tile.k]:
                    if k <= q:
                        who[q, k] = rank + 1
    return who


def _colour_map() -> object:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["0.85", "white", *COLOURS])


def balance(path: Path) -> None:
    """Scores that each rank computes at each step, for every layout."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, len(LAYOUTS), sharey=True)
    order = [name for name in ("contiguous", "striped", "zigzag") if name in LAYOUTS]
    for axes, layout in zip(panels, order, strict=True):
        plan = make_plan(layout, RANKS, TOKENS, causal=True)
        pairs = np.array([[step.num_pairs for step in plan.steps[rank]] for rank in range(RANKS)])
        for rank in range(RANKS):
            axes.bar(np.arange(RANKS) + 0.2 * rank - 0.3, pairs[rank], 0.18, color=COLOURS[rank])
        slowest = pairs.max(0).sum() * RANKS / pairs.sum()
        axes.set_title(f"{layout}: {slowest:.2f} x the time of equal shares", fontsize=10)
        axes.set_xticks(range(RANKS), [f"step {index}" for index in range(RANKS)])
    panels[0].set_ylabel(f"scores computed ({TOKENS} tokens)")
    handles = [Patch(color=COLOURS[rank], label=f"rank {rank}") for rank in range(RANKS)]
    figure.legend(handles=handles, loc="outside lower center", ncols=RANKS)
    figure.savefig(path, dpi=110)


def overlap(path: Path) -> None:
    """Computing and messages of a simulated ring, for a long and for a short sequence."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for axes, tokens in zip(figure.subplots(2, 1), (LONG, SHORT), strict=True):
        plan = make_plan("zigzag", RANKS, tokens, causal=True)
        times = _simulated(plan)
        for rank in range(RANKS):
            _lane(axes, plan, times, rank)
        axes.set_yticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)])
        axes.invert_yaxis()
        axes.set_xlabel("us, simulated")
        axes.set_title(
            f"{tokens} tokens on {RANKS} trn2 chips, {SUSTAINED_TFLOPS:g} TFLOP/s assumed: "
            f"{times.exposed_ns / times.total_ns:.0%} of {times.total_ns / 1e3:.0f} us is waiting",
            fontsize=10,
        )
    handles = [
        Patch(color=COLOURS[0], label="computes"),
        Patch(color="0.6", label="keys and values of the next step arrive"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def _simulated(plan: Plan) -> RingTimes:
    cluster = Cluster(generation="gen3", num_positions=RANKS, tensor_parallel=4, lnc=2)
    model = Model(num_heads=32, num_kv_heads=8, head_dim=128)
    kernel = Rate(SUSTAINED_TFLOPS * 1e3, 4 * model.head_dim * model.num_heads)
    return simulate(plan, cluster, model, kernel)


def _lane(axes: Axes, plan: Plan, times: RingTimes, rank: int) -> None:
    for index, step in enumerate(plan.steps[rank]):
        begin, end = times.start[index, rank] / 1e3, times.end[index, rank] / 1e3
        axes.barh(rank - 0.18, end - begin, 0.3, begin, color=COLOURS[0], edgecolor="white")
        middle = (begin + end) / 2
        axes.text(middle, rank - 0.18, f"{index}", ha="center", va="center", color="white")
        if step.kv is not None:
            sent = max(times.start[index, rank], times.start[index, step.kv.source]) / 1e3
            arrival = times.arrival[index + 1, rank] / 1e3
            axes.barh(rank + 0.18, arrival - sent, 0.22, sent, color="0.6", edgecolor="white")


def timeline(path: Path) -> None:
    """The engines of one core in a forward kernel."""
    block = Block(kernel="flash_fwd", generation="gen3", queries=512, keys=512)
    (times,) = time_call(block).values()
    timeline_png(path, times.timeline)


PICTURES = {
    "grid": grid,
    "ring_steps": ring_steps,
    "balance": balance,
    "overlap": overlap,
    "timeline": timeline,
}


def main(folder: Path) -> None:
    """Draw all pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(folder / f"concepts_{name}.png")
        print(folder / f"concepts_{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images"))
