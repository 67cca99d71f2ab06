"""Draw the pictures of docs/kernels/ from the instruction logs of simulated kernels.

    python scripts/draw_kernels.py [FOLDER]        default: docs/images

Needs the extras `plot` and `sim`. Does: run every kernel of this repository once, on gen3, and show
which tiles its matmuls cover, in order, what lies where on the chip, and what DMA and messages do.
Does not: time anything; the x axis of a picture is the instruction number.
"""

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import this_clone  # noqa: F401
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.backends.ring_arguments import backward_arguments, forward_arguments
from nxd_cp.schedule import Bounded, token_runs
from nxd_cp.simulators.cluster.measure import kernel_log
from nxd_cp.simulators.nki_api import SimParams, load, parameters, record, simulate_ranks
from nxd_cp.simulators.nki_api.log import Log, Record, View

LENGTH, HEAD_DIM, ROWS = 1024, 64, 128
ENGINES = {
    "tensor": "tab:blue",
    "vector": "tab:green",
    "scalar": "tab:red",
    "gpsimd": "tab:purple",
    "dma": "0.6",
}


@dataclass(frozen=True)
class Cover:
    """The scores that one matmul reads or writes: first row and key, and how many of each."""

    row: int
    key: int
    rows: int
    keys: int


@lru_cache
def functions(file: str) -> dict[int, str]:
    """The function of each line of a kernel's file."""
    found = {}
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.update(dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), node.name))
    return found


def matmuls(log: Log, *names: str) -> list[Record]:
    """The matmuls that these functions issue, in order."""
    found = [r for r in log if r.opcode == "nc_matmul"]
    return [r for r in found if functions(r.file)[r.line] in names]


def numbered(views: Iterable[View]) -> dict[int, int]:
    """0, 1, 2, ... for the buffers of these views, in the order in which they were allocated."""
    return {buffer: i for i, buffer in enumerate(sorted({view.buffer for view in views}))}


def operands(one: Record) -> tuple[View, View, View]:
    """Destination, stationary and moving operand of a matmul."""
    assert one.dst is not None, "a matmul has a destination"
    return one.dst, one.sources[0], one.sources[1]


def forward_covers(log: Log) -> dict[str, list[Cover]]:
    """What the three kinds of matmuls of `flash_fwd` cover, for one head."""
    contractions = [operands(r) for r in matmuls(log, "contract")]
    keys_buffer = contractions[0][2].buffer  # the row maxima come first: queries stationary
    blocks = numbered(b for _, a, b in contractions if a.buffer == keys_buffer)
    covers: dict[str, list[Cover]] = {"row maximum": [], "scores": [], "p v": []}
    for _, a, b in contractions:
        transposed = a.buffer == keys_buffer
        key, query = (a, b) if transposed else (b, a)
        row = 4 * ROWS * blocks[query.buffer] + query.offset
        kind = "scores" if transposed else "row maximum"
        covers[kind].append(Cover(row, key.offset, query.shape[1], key.shape[1]))
    products = [operands(r) for r in matmuls(log, "attend")]
    units = numbered(dst for dst, _, _ in products)
    for dst, p, v in products:
        key = v.offset // v.shape[1] * ROWS
        covers["p v"].append(Cover(units[dst.buffer] * ROWS, key, p.shape[1], p.shape[0]))
    return covers


def backward_covers(log: Log) -> dict[str, list[Cover]]:
    """What the matmuls of `flash_bwd` cover, for one head."""
    names = ("contract", "add_key_gradients", "add_query_gradient")
    covers: dict[str, list[Cover]] = {"scores and do v^T": [], "dv and dk": [], "dq": []}
    row = 0
    tiles: dict[str, dict[int, int]] = {
        name: numbered(operands(r)[0] for r in matmuls(log, name)) for name in names
    }
    for one in matmuls(log, *names):
        dst, a, b = operands(one)
        name = functions(one.file)[one.line]
        if name == "contract":
            row = a.offset
            cover = Cover(row, b.offset, a.shape[1], b.shape[1])
        elif name == "add_key_gradients":
            wide = tiles[name][dst.buffer] // 2  # dk and dv of a key tile: two buffers
            key = wide * 4 * ROWS + dst.offset // dst.shape[1] * ROWS
            cover = Cover(row, key, a.shape[0], a.shape[1])
        else:
            cover = Cover(row, b.offset // b.shape[1] * ROWS, a.shape[1], a.shape[0])
        found = covers[list(covers)[names.index(name)]]
        if not found or found[-1] != cover:  # two products over one rectangle: drawn once
            found.append(cover)
    return covers


def check(covers: dict[str, list[Cover]]) -> None:
    """Every kind covers each causally visible score."""
    for kind, found in covers.items():
        seen = np.zeros((LENGTH, LENGTH), dtype=bool)
        for c in found:
            seen[c.row : c.row + c.rows, c.key : c.key + c.keys] = True
        assert seen[np.tril_indices(LENGTH)].all(), f"{kind} leaves out scores"


def draw_covers(path: Path, title: str, covers: dict[str, list[Cover]]) -> None:
    """One panel per kind of matmul, coloured and numbered in the order of the log."""
    check(covers)
    figure = Figure(figsize=(13, 5.0), layout="constrained")
    panels = figure.subplots(1, len(covers), sharey=True)
    for axes, (kind, found) in zip(panels, covers.items(), strict=True):
        for i, c in enumerate(found):
            colour = colormaps["viridis"](0.25 + 0.75 * i / len(found))
            patch = Rectangle((c.key, c.row), c.keys, c.rows, facecolor=colour, edgecolor="white")
            axes.add_patch(patch)
            middle = (c.key + c.keys / 2, c.row + c.rows / 2)
            axes.text(*middle, str(i), ha="center", va="center", fontsize=8)
        axes.plot([0, LENGTH], [0, LENGTH], color="black", linewidth=1)
        axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), aspect="equal", xlabel="key")
        axes.set_xticks(range(0, LENGTH + 1, 256))
        axes.set_yticks(range(0, LENGTH + 1, 256))
        axes.set_title(f"{kind}: {len(found)} rectangles", fontsize=11)
    panels[0].set_ylabel("query")
    figure.suptitle(f"{title}, causal, {LENGTH} x {LENGTH}, one head: order of the matmuls")
    figure.savefig(path, dpi=100)


def draw_memory(path: Path, title: str, log: Log) -> None:
    """Every buffer of SBUF and PSUM: address against first to last use, by its first writer."""
    spans: dict[int, list[int]] = {}
    writers: dict[int, str] = {}
    for one in log:
        for view in (one.dst, *one.sources):
            if view is not None:
                spans.setdefault(view.buffer, [one.seq, one.seq])[1] = one.seq
        if one.dst is not None:
            writers.setdefault(one.dst.buffer, one.engine)
    figure = Figure(figsize=(11, 6.0), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, space in zip(panels, ("sbuf", "psum"), strict=True):
        for buffer, (first, last) in spans.items():
            info = log.buffers[buffer]
            if info.space == space:
                corner, height = (first, info.address / 1024), info.row_bytes / 1024
                colour = ENGINES[writers[buffer]]
                axes.add_patch(
                    Rectangle(corner, last - first + 1, height, facecolor=colour, edgecolor="white")
                )
        axes.autoscale_view()
        axes.set_ylabel(f"{space.upper()}, KiB of a partition")
    panels[1].set_xlabel("instruction number: from the first to the last use of a buffer")
    handles = [Patch(color=ENGINES[e], label=e) for e in ENGINES if e in writers.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, title="first written by")
    figure.suptitle(f"{title}, causal, {LENGTH} x {LENGTH}, head dim {HEAD_DIM}, bf16")
    figure.savefig(path, dpi=100)


def block_log(kernel: str) -> Log:
    """One causal block on gen3."""
    return kernel_log(kernel, "gen3", q_len=LENGTH, k_len=LENGTH, mask="causal", head_dim=HEAD_DIM)


def draw_ring(path: Path) -> None:
    """The programs of one of four ranks: engines, and when messages are issued."""
    q, kv = torch.zeros(1, 1, 256, 64), torch.zeros(1, 1, 256, 64)
    call = forward_arguments(q, kv, kv, groups=((0, 1, 2, 3),), causal=True, scale=0.125)
    row = torch.zeros(1, 1, 256)
    calls = {"ring_fwd": call, "ring_bwd": backward_arguments(q, row, row, call)}
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    for axes, (name, arguments) in zip(figure.subplots(2, 1), calls.items(), strict=True):
        kernel = getattr(getattr(load("nxd_cp.kernels", generation="gen3"), name), name)
        with parameters(SimParams(values=False)), record() as log:
            simulate_ranks(kernel, [arguments] * 4, generation="gen3")
        _strip(axes, log)
        axes.set_title(f"{name}, rank 0 of 4: {len(log)} instructions", fontsize=11)
    handles = [Patch(color=colour, label=engine) for engine, colour in ENGINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=100)


def _strip(axes: Axes, log: Log) -> None:
    for i, (engine, colour) in enumerate(ENGINES.items()):
        axes.eventplot(
            [r.seq for r in log if r.engine == engine],
            lineoffsets=i,
            linelengths=0.8,
            linewidths=0.5,
            color=colour,
        )
    permutes = [e for e in log.exchanges if "permute" in e.kind and e.sources]
    for one in permutes:
        name = log.buffers[one.sources[0].buffer].name
        to = log.buffers[one.destinations[0].buffer].name
        axes.axvline(one.seq, color="black", linewidth=1)
        late = name.startswith("grads")
        height = len(ENGINES) + (0.35 if late else -0.35)
        side = "right" if late else "left"
        axes.text(one.seq, height, f" {name} to {to} ", fontsize=8, ha=side)
    axes.set_ylim(-0.6, len(ENGINES) + 1)
    axes.set_yticks(range(len(ENGINES)), ENGINES)
    axes.set_xlabel("instruction number; lines: a message is issued")


def draw_loops(path: Path) -> None:
    """Matmuls that ran under windows of several widths, with and without device loops."""
    rows, keys = 1024, 4096
    widths = (64, 512, 1024, 2048, 3072)
    found: dict[str, list[int]] = {}
    q, k = torch.zeros(1, 1, rows, 32), torch.zeros(1, 1, keys, 32)
    row = torch.zeros(1, 1, rows)
    for loops in (False, True):
        backend = KernelBackend("simulate", "gen3", device_loops=loops)
        for width in widths:
            scores = Scores(Bounded(0, width - 1), 1.0)
            with record() as forward:
                backend.forward(q, k, k, scores)
            with record() as backward:
                backend.backward(QueryRows(q, q, q, row, row), k, k, scores)
            for name, log in (("fwd", forward), ("bwd", backward)):
                kernel = f"{'loop' if loops else 'flash'}_{name}"
                found.setdefault(kernel, []).append(log.counts()["nc_matmul"])
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for kernel, counts in found.items():
        style = "o-" if kernel.startswith("loop") else "--"
        colour = "tab:blue" if kernel.endswith("fwd") else "tab:red"
        axes.plot(widths, counts, style, color=colour, label=kernel)
    axes.set(xlabel="keys that a row sees", ylabel="nc_matmul in the log", ylim=(0, None))
    axes.set_title(
        f"{rows} rows, {keys} keys, one head: row i sees keys i, i + 1, ...", fontsize=11
    )
    axes.legend()
    figure.savefig(path, dpi=100)


def draw_permute(path: Path) -> None:
    """Which tokens each DMA of `permute_tokens` moves where."""
    size, tokens = 4, 32
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, layout in zip(figure.subplots(1, 2), ("zigzag", "striped"), strict=True):
        runs = tuple(
            (run.start, len(run), run.step)
            for rank in range(size)
            for run in token_runs(layout, size, rank, tokens)
        )
        permute = load("nxd_cp.kernels", generation="gen3").permute.permute_tokens
        with record() as log:
            permute(np.zeros((1, tokens, 1), np.int32), runs)
        for i, one in enumerate(log):
            assert one.dst is not None, "a DMA has a destination"
            src, dst = one.sources[0], one.dst
            count = np.arange(src.shape[0])
            to = dst.offset + dst.strides[0] * count
            axes.plot(to, src.offset + src.strides[0] * count, "o-", label=f"DMA {i}")
        for rank in range(size):
            axes.axvspan(rank * 8 - 0.5, rank * 8 + 7.5, color="0.93" if rank % 2 else "white")
            axes.text(rank * 8 + 3.5, tokens, f"rank {rank}", ha="center")
        axes.set(xlabel="place in the result", ylabel="token", ylim=(-1, tokens + 2))
        axes.set_title(f"{layout}: {len(log)} DMAs")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def main(folder: Path) -> None:
    """Draw all pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    forward, backward = block_log("flash_fwd"), block_log("flash_bwd")
    draw_covers(folder / "kernels_fwd_tiles.png", "flash_fwd", forward_covers(forward))
    draw_memory(folder / "kernels_fwd_memory.png", "flash_fwd", forward)
    draw_covers(folder / "kernels_bwd_tiles.png", "flash_bwd", backward_covers(backward))
    draw_memory(folder / "kernels_bwd_memory.png", "flash_bwd", backward)
    draw_ring(folder / "kernels_ring.png")
    draw_loops(folder / "kernels_loops.png")
    draw_permute(folder / "kernels_permute.png")
    for path in sorted(folder.glob("kernels_*.png")):
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images"))
