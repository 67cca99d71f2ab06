"""Two pictures of a report in one PNG: time and MFU over sequence length, a curve per series."""

from __future__ import annotations

from pathlib import Path

from nxd_cp.bench.report import LABELS, Report, Row


def plot(report: Report, path: Path) -> None:
    """Write the PNG; bars span bound to pessimistic, or p50 to p99."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2))
    low_name, high_name = (
        ("bound", "pessimistic") if report.source == "simulated" else ("p50", "p99")
    )
    styles = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--")]
    series = _series(report)
    colours = colormaps["tab20" if len(series) > 10 else "tab10"](range(20))
    lengths = sorted({row.length for row in report.rows if row.times})
    for index, (name, rows) in enumerate(series.items()):
        marker, line = styles[index % len(styles)]
        style = {
            "marker": marker,
            "linestyle": line,
            "color": colours[index % len(colours)],
            "markersize": 5,
        }
        x = [row.length for row in rows]
        times = [row.times for row in rows if row.times]
        y = [t.us[t.main] for t in times]
        spread = [
            [max(0.0, value - t.us[low_name]) for value, t in zip(y, times, strict=True)],
            [max(0.0, t.us[high_name] - value) for value, t in zip(y, times, strict=True)],
        ]
        beside = [length * (1 + 0.02 * (index - len(series) / 2)) for length in x]  # bars apart
        left.errorbar(beside, y, yerr=spread, capsize=3, linewidth=1.3, elinewidth=0.7, **style)
        right.plot(x, [100 * (report.mfu(row) or 0.0) for row in rows], label=name, **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("queries = keys")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel(f"time of one launch, us (bars: {low_name} to {high_name})")
    right.set_ylabel(f"MFU, % of {report.peak_tflops:.1f} TFLOP/s (bf16 peak)")
    right.set_ylim(bottom=0)
    if report.rows:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.suptitle(f"{report.target}: {LABELS[report.source]}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(report: Report) -> dict[str, list[Row]]:
    """Rows with a time by curve, in order of length."""
    found: dict[str, list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: row.length):
        if row.times is not None:
            found.setdefault(f"{row.series} ({row.implementation})", []).append(row)
    return found
