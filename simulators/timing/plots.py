"""Pictures: the timeline of a kernel and its roofline, as PNG. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .constants import constants_for
from .critical import guess_share
from .estimate import Estimate
from .profile import hbm_bytes
from .timeline import Timeline

_COLOURS = {
    "tensor": "tab:blue",
    "vector": "tab:orange",
    "scalar": "tab:green",
    "gpsimd": "tab:purple",
}


def timeline_png(
    path: Path, line: Timeline, *, begin_ns: float = 0.0, end_ns: float | None = None
) -> None:
    """Lanes of engines and DMA queues from begin_ns to end_ns (default: everything)."""
    from matplotlib.figure import Figure

    end = line.total_ns if end_ns is None else end_ns
    lanes = sorted(set(line.program.queues), key=lambda q: (q.startswith("dma"), q))
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for row, lane in enumerate(lanes):
        spans = []
        for record, queue in enumerate(line.program.queues):
            if queue != lane:
                continue
            first, last = line.transfer.get(record, (line.start[record], line.free[record]))
            if last > begin_ns and first < end:
                spans.append((first / 1e3, max(last - first, 1.0) / 1e3))
        axes.broken_barh(spans, (row - 0.4, 0.8), color=_COLOURS.get(lane, "tab:gray"))
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlim(begin_ns / 1e3, end / 1e3)
    axes.invert_yaxis()
    axes.set_xlabel("us")
    guessed = f"{100 * guess_share(line):.0f} % rests on guesses"
    axes.set_title(f"{line.program.generation}: estimated timeline (not measured; {guessed})")
    figure.savefig(path, dpi=110)


def roofline_png(path: Path, kernels: Mapping[str, Estimate]) -> None:
    """Flop rate against flops per byte of HBM traffic, with the roof of each generation.

    A kernel without products on TensorE has no point; the legend says so.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for generation in sorted({times.generation for times in kernels.values()}):
        values = constants_for(generation).at("expected")
        peak = 2 * 128 * 128 * values.tensor_clock / 1e3
        ridge = peak * 1e3 / values.dma_core_rate
        points = [1.0, ridge, max(10 * ridge, 1e4)]
        axes.plot(
            points,
            [min(peak, p * values.dma_core_rate / 1e3) for p in points],
            label=f"{generation}: {peak:.0f} TFLOP/s bf16, {values.dma_core_rate:.0f} GB/s",
        )
    for name, times in kernels.items():
        moved = max(1, sum(hbm_bytes(times)))
        flops = times.tensor_flops or float("nan")  # zero has no place on a logarithmic axis
        axes.plot(
            flops / moved, flops / times.expected_ns / 1e3, "o", label=roofline_label(name, times)
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flop per byte of HBM traffic")
    axes.set_ylabel("TFLOP/s per core")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def roofline_label(name: str, times: Estimate) -> str:
    """What the legend says of a kernel; of one in a file the file's name without its folder."""
    rate = f"{100 * times.mfu:.0f} % MFU" if times.tensor_flops else "no products, so no point"
    return (
        f"{Path(name).name} ({rate}, estimated, {100 * times.guess_share:.0f} % rests on guesses)"
    )
