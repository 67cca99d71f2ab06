"""Compare the runs of the demo, and show them as a table and as a plot.

Two kinds of bound. With the torch backend: 1e-6 for the first step, 1e-5 for later ones, relative,
fp32. With the simulated kernels the bound comes from the data: see `rounding_bound`.

Times are measured on the machine at hand; with `backend="simulate"` they are the time of the
simulator on this CPU and say nothing about a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nxd_cp.demo.settings import RunSettings, Sent, StepRecord

FIRST_STEP_BOUND = 1e-6
LATER_STEP_BOUND = 1e-5
FP32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class RankResult:
    """One row of the table: a run on `num_ranks` ranks beside the same run on one rank.

    Differences are relative to the one-rank loss. `sent` was counted, `scheduled` is what the
    schedule says, both for rank 0 and one training step.
    """

    num_ranks: int
    first_loss: float
    last_loss: float
    first_difference: float
    later_difference: float
    tokens_per_second: float
    sent: Sent
    scheduled: Sent


def differences(
    steps: Sequence[StepRecord], reference: Sequence[StepRecord]
) -> tuple[float, float]:
    """Relative difference of the losses: at the first step, and the largest of all later ones."""
    first, *later = relative_differences(steps, reference)
    # max() of a list with NaN depends on the order, so NaN is looked for first.
    return first, next((x for x in later if x != x), max(later, default=0.0))


def relative_differences(
    steps: Sequence[StepRecord], reference: Sequence[StepRecord]
) -> list[float]:
    """|loss - reference| / |reference| of every step."""
    pairs = zip(steps, reference, strict=True)
    return [abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs]


def compare(
    run: RunSettings, records: dict[int, list[StepRecord]], scheduled: dict[int, Sent]
) -> list[RankResult]:
    """One row per number of ranks.

    Args:
        run: the settings that all these runs share.
        records: by number of ranks; 1 must be there.
        scheduled: what rank 0 sends per step by the schedule, by number of ranks.

    Raises:
        ValueError: a step sent another number of messages or bytes than its neighbours.
    """
    one = records[1]
    rows = []
    for num_ranks, steps in sorted(records.items()):
        sent = {record.sent for record in steps}
        if len(sent) != 1:
            raise ValueError(f"expected every step to send the same, got {sent}")
        first, later = differences(steps, one)
        rows.append(
            RankResult(
                num_ranks,
                steps[0].loss,
                steps[-1].loss,
                first,
                later,
                run.seq_len / median(record.seconds for record in steps[1:] or steps),
                sent.pop(),
                scheduled[num_ranks],
            )
        )
    return rows


def rounding_bound(plain: Sequence[StepRecord], moved: Sequence[StepRecord]) -> tuple[float, float]:
    """How far losses may lie apart that differ only in the order of additions: (first, later).

    `moved` is the one-rank run with every initial weight moved by one fp32 rounding. Each weight is
    off by at most 2 ** -24 of itself there, the least that fp32 can be off, and the drift of its
    losses is what training makes of that. A ring adds its own roundings in every layer and step, so
    four such drifts are allowed, and never less than four roundings of the loss itself.
    """
    first, later = differences(moved, plain)
    floor = 4 * FP32_ROUNDING
    return max(4 * first, floor), max(4 * later, floor)


def failures(rows: Sequence[RankResult], first_bound: float, later_bound: float) -> list[str]:
    """One sentence for everything that is not as promised; empty when all is well."""
    found = []
    for row in rows:
        where = f"{row.num_ranks} ranks:"
        # `not (a <= b)` also catches a loss that is NaN.
        if not row.first_difference <= first_bound:
            found.append(
                f"{where} first loss off by {row.first_difference:.1e} > {first_bound:.1e}"
            )
        if not row.later_difference <= later_bound:
            found.append(
                f"{where} later loss off by {row.later_difference:.1e} > {later_bound:.1e}"
            )
        if row.sent != row.scheduled:
            found.append(f"{where} sent {row.sent} per step, the schedule says {row.scheduled}")
        if not row.last_loss < row.first_loss:
            found.append(f"{where} loss did not fall: {row.first_loss:.4f} to {row.last_loss:.4f}")
    return found


def table(run: RunSettings, rows: Sequence[RankResult], first: float, later: float) -> Table:
    """The rows in 80 columns, with the bounds that they were held against in the caption."""
    result = Table(
        title=f'backend="{run.backend}", {run.seq_len} tokens, {run.num_steps} steps, {run.layout}',
        caption=f"differences to 1 rank, relative; allowed: first {first:.1e}, later {later:.1e}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    headings = ["ranks", "loss\nfirst", "loss\nlast", "diff\nfirst", "diff\nlater", "tokens\nper s"]
    headings += ["sent\n= plan", "bytes per\nstep", "bytes by\nschedule"]
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            str(row.num_ranks),
            f"{row.first_loss:.4f}",
            f"{row.last_loss:.4f}",
            f"{row.first_difference:.1e}",
            f"{row.later_difference:.1e}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.sent.num_messages} = {row.scheduled.num_messages}",
            f"{row.sent.size_bytes:,}",
            f"{row.scheduled.size_bytes:,}",
        )
    return result


def plot(runs: Sequence[tuple[RunSettings, dict[int, list[StepRecord]]]], path: Path) -> None:
    """Write one PNG: a column per run, losses above, differences to one rank below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(
        2, len(runs), figsize=(5.2 * len(runs), 6), height_ratios=[2, 1], squeeze=False
    )
    styles = {1: ("C0-", 4.0), 2: ("C1-", 1.8), 4: ("C2--", 1.2)}
    for (above, below), (run, records) in zip(axes.T, runs, strict=True):
        one = records[1]
        for num_ranks, steps in sorted(records.items()):
            line, width = styles.get(num_ranks, ("C3:", 1.2))
            label = f"{num_ranks} rank" + ("s" if num_ranks > 1 else "")
            x = [record.step for record in steps]
            above.plot(x, [r.loss for r in steps], line, linewidth=width, label=label)
            if num_ranks > 1:
                apart = relative_differences(steps, one)
                below.semilogy(x, [max(d, 1e-9) for d in apart], f"{line[:2]}.-", label=label)
        above.set_title(f"backend={run.backend}, {run.seq_len} tokens per step", fontsize=10)
        above.set_ylabel("loss (nats per byte)")
        below.set_ylabel("relative difference\nto 1 rank (floor 1e-9)")
        below.set_xlabel("step")
        below.set_ylim(5e-10, 2 * LATER_STEP_BOUND)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        above.sharex(below)
        above.legend()
        below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
