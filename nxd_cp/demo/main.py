"""What `nxd-cp demo` does, from top to bottom: launch, compare, print, plot."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nxd_cp.demo.data import load_text
from nxd_cp.demo.launch import Records, launch
from nxd_cp.demo.report import (
    FIRST_STEP_BOUND,
    LATER_STEP_BOUND,
    compare,
    differences,
    failures,
    plot,
    rounding_bound,
    table,
)
from nxd_cp.demo.settings import RunSettings, Sent, StepRecord
from nxd_cp.schedule import make_plan

RANK_COUNTS = (1, 2, 4)
FP32_BYTES = 4


def run_demo(
    out: Path,
    steps: int = 60,
    seq_len: int = 2048,
    simulate_steps: int = 20,
    simulate_seq_len: int = 1024,
    layout: str = "zigzag",
    rank_counts: tuple[int, ...] = RANK_COUNTS,
) -> bool:
    """Train, print a table per backend, write `out`/loss.png; True when everything agrees.

    Raises:
        ValueError: a length does not fit the layout, the largest ring or the kernels, or a package
            that the demo needs is missing.
        RuntimeError: a worker failed.
    """
    _require(["matplotlib"] + ["ml_dtypes"] * bool(simulate_steps))
    console = Console()
    torch_run = RunSettings("torch", "torch", seq_len, steps, layout)
    runs = [torch_run]
    extra: dict[int, list[RunSettings]] = {}
    if simulate_steps:
        simulate_run = RunSettings("simulate", "simulate", simulate_seq_len, simulate_steps, layout)
        runs.append(simulate_run)
        plain = replace(simulate_run, name="plain", backend="torch")
        extra[1] = [plain, replace(plain, name="moved", rounding_seed=1)]
    for num_ranks in sorted(rank_counts, reverse=True):  # the largest ring asks for most
        for run in runs:
            _check_length(run, num_ranks)
    traffic = {run.name: {n: scheduled_per_step(run, n) for n in rank_counts} for run in runs}
    records = {n: _train(runs + extra.get(n, []), n, out, console) for n in rank_counts}

    problems: list[str] = []
    for run in runs:
        by_ranks = {n: records[n][run.name] for n in rank_counts}
        first, later = FIRST_STEP_BOUND, LATER_STEP_BOUND
        if run.backend == "simulate":
            first, later = rounding_bound(records[1]["plain"], records[1]["moved"])
            kernels = differences(records[1][run.name], records[1]["plain"])
            note = (
                f"kernels against PyTorch, 1 rank: {kernels[0]:.1e} first, {kernels[1]:.1e} later"
            )
            console.print(note)
            if not (kernels[0] <= first and kernels[1] <= later):
                problems.append(f"{note}, more than the bounds below")
        rows = compare(run, by_ranks, traffic[run.name])
        console.print(table(run, rows, first, later))
        problems += [f"{run.name}, {found}" for found in failures(rows, first, later)]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "loss.png"
    plot([(run, {n: records[n][run.name] for n in rank_counts}) for run in runs], picture)
    console.print(f"loss curves: {picture}")
    for problem in problems:
        console.print(f"[red]disagreement:[/red] {problem}")
    console.print("all losses agree" if not problems else f"{len(problems)} disagreements")
    return not problems


def _require(packages: list[str]) -> None:
    """Raise ValueError for a package of the extras that is not there, before any training."""
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(
                f"expected {package} to be installed; run pip install 'nxd-cp[sim,plot]'"
            )


def _check_length(run: RunSettings, num_ranks: int) -> None:
    """Raise ValueError for a length that the layout cannot cut, or longer than the text."""
    if run.seq_len > (most := len(load_text())):
        raise ValueError(f"sequence length: expected at most {most} bytes, got {run.seq_len}")
    make_plan(run.layout, num_ranks, run.seq_len)


def scheduled_per_step(run: RunSettings, num_ranks: int) -> Sent:
    """What rank 0 sends round the ring in one training step, by the schedule."""
    plan = make_plan(run.layout, num_ranks, run.seq_len, causal=True)
    model = run.model
    traffic = plan.traffic(
        0,
        batch=1,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=FP32_BYTES,
    )
    return Sent(
        model.num_layers * (traffic.forward_messages + traffic.backward_messages),
        model.num_layers * (traffic.forward_bytes + traffic.backward_bytes),
    )


def _train(runs: list[RunSettings], num_ranks: int, out: Path, console: Console) -> Records:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = sum(run.num_steps for run in runs)
        what = f"{num_ranks} rank" + ("s" if num_ranks > 1 else " ")
        task = progress.add_task(what, total=total, note="starting")

        def on_step(name: str, record: StepRecord) -> None:
            progress.update(task, advance=1, note=f"{name} loss {record.loss:.4f}")

        return launch(runs, num_ranks, out, on_step)
