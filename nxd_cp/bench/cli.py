"""`nxd-cp bench`: time the attention kernels, or compare two earlier runs."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nxd_cp.command_options import Instance, LncOption, refuse_given

if TYPE_CHECKING:
    from nxd_cp.bench.cases import Case
    from nxd_cp.bench.run import Plan

HELP = """Time the attention kernels: on a Neuron device, or simulated, labelled so.

\b
nxd-cp bench --target trn1                      no device needed, < 1 minute
nxd-cp bench --target trn2 --lnc 2              two cores, twice the heads
nxd-cp bench --lengths 512,1024 --head-dims 64  a sweep of your own
nxd-cp bench compare before.json after.json     status 1 if any is slower

Every kernel is first checked against fp64 on a short block; one that fails
gets no time, and the exit status is 1. Written to the folder --out:
bench.json, bench.md, bench.png. On a device NxD's own flash and ring
kernels are timed beside ours where they can be imported.
"""

OF_SWEEPS = ("masks", "head_dims", "heads", "dtypes")

app = typer.Typer(help=HELP)


class Preset(str, Enum):
    """Named sets of cases."""

    quick = "quick"
    standard = "standard"
    wide = "wide"


class Clock(str, Enum):
    """Where times come from."""

    auto = "auto"
    simulated = "simulated"
    device = "device"


@app.callback(invoke_without_command=True, help=HELP)
def bench(
    context: typer.Context,
    target: Annotated[
        Instance, typer.Option(help="The chip (inf2 counts as trn1).")
    ] = Instance.trn1,
    preset: Annotated[
        Preset, typer.Option(help="Cases: quick (4), standard (20) or wide (40).")
    ] = Preset.standard,
    clock: Annotated[
        Clock, typer.Option(help="auto: the device where there is one, else simulated.")
    ] = Clock.auto,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/bench"),
    lengths: Annotated[
        str, typer.Option(help="Sweep instead of a preset: queries = keys, as 512,1024.")
    ] = "",
    masks: Annotated[str, typer.Option(help="Of the sweep: causal, full, strict.")] = "causal",
    head_dims: Annotated[str, typer.Option(help="Of the sweep.")] = "128",
    heads: Annotated[str, typer.Option(help="Of the sweep: query:kv heads, as 1:1,4:1.")] = "1:1",
    dtypes: Annotated[str, typer.Option(help="Of the sweep: bfloat16, float32.")] = "bfloat16",
    lnc: LncOption = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Launches per case on a device.")] = 100,
) -> None:
    """See HELP; the text is given to typer as it is."""
    if context.invoked_subcommand is not None:
        return
    if lengths:
        refuse_given(context, ["preset"], "expected a preset or --lengths, got both")
    else:
        refuse_given(context, OF_SWEEPS, "expected --lengths with it, got none")
    from nxd_cp.bench.cases import preset as named
    from nxd_cp.bench.report import markdown, text
    from nxd_cp.bench.run import run

    try:
        sweep = _sweep(lengths, masks, head_dims, heads, dtypes) if lengths else []
        cases = sweep or [case.with_heads(lnc) for case in named(preset.value)]
        plan = _plan(target.value, clock, cases, repeats, lnc)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    report = run(plan, _progress)
    out.mkdir(parents=True, exist_ok=True)
    report.write(out / "bench.json")
    (out / "bench.md").write_text(markdown(report))
    typer.echo(text(report))
    if _can_plot():
        from nxd_cp.bench.plots import plot

        plot(report, out / "bench.png")
    else:
        typer.echo("no picture: pip install 'nxd-cp[plot]'")
    typer.echo(f"written: {out}")
    raise typer.Exit(1 if report.refused else 0)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="bench.json of the earlier run.")],
    after: Annotated[Path, typer.Argument(help="bench.json of the later run.")],
    threshold: Annotated[float, typer.Option(help="Percent that may be lost.")] = 5.0,
) -> None:
    """Compare two runs; exit status 1 when a case is slower, gone, or fails its numerics check."""
    from nxd_cp.bench.compare import compare as changes_between
    from nxd_cp.bench.compare import text
    from nxd_cp.bench.report import Report

    try:
        changes = changes_between(Report.read(before), Report.read(after), threshold / 100)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(text(changes, threshold / 100))
    raise typer.Exit(1 if any(change.bad for change in changes) else 0)


@app.command()
def neff(
    path: Annotated[Path, typer.Argument(help="A compiled kernel, NAME.neff.")],
    inputs: Annotated[Path, typer.Argument(help="An .npz with an array per input of the NEFF.")],
    repeats: Annotated[int, typer.Option(min=1, help="Executions that are timed.")] = 100,
) -> None:
    """Time a compiled kernel on this device with nrtpy (Neuron 2.32 and newer): device clock."""
    import numpy as np

    from nxd_cp.bench.device import time_neff

    try:
        times = time_neff(path, dict(np.load(inputs)), repeats=repeats)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(", ".join(f"{name} {us:.1f} us" for name, us in times.us.items()))
    typer.echo(f"measured, {times.note}; numerics not checked")


def _sweep(lengths: str, masks: str, head_dims: str, heads: str, dtypes: str) -> list[Case]:
    from nxd_cp.bench.cases import sweep

    return sweep(
        lengths=_numbers("lengths", lengths),
        masks=masks.split(","),
        head_dims=_numbers("head-dims", head_dims),
        heads=[_head_counts(pair) for pair in heads.split(",")],
        dtypes=dtypes.split(","),
    )


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected numbers as 512,1024, got {text!r}") from None


def _head_counts(pair: str) -> tuple[int, int]:
    """Query and key/value heads of "4:1"."""
    query, colon, kv = pair.partition(":")
    if not (colon and query.isdecimal() and kv.isdecimal()):
        raise ValueError(f"heads: expected query:kv heads as 4:1, got {pair!r}")
    return int(query), int(kv)


def _plan(target: str, clock: Clock, cases: list[Case], repeats: int, lnc: int) -> Plan:
    """Simulated, or on the device that the doctor finds. Raises ValueError when there is none."""
    from nxd_cp.backends.neuron import KernelBackend
    from nxd_cp.bench.device import HostClockTimer, waiter
    from nxd_cp.bench.implementations import Implementation, OurKernels, nxd_kernels
    from nxd_cp.bench.run import Plan
    from nxd_cp.bench.simulated import SimulatedTimer, generation, peak_tflops
    from nxd_cp.doctor.machine import look
    from nxd_cp.doctor.packages import find_all
    from nxd_cp.doctor.tier import decide

    tier = decide(find_all(), look())
    on_device = tier.backend == "nki"
    if clock is Clock.device and not on_device:
        raise ValueError(f"clock: expected a Neuron device, got none; {'; '.join(tier.reasons)}")
    peak = peak_tflops(target, lnc)
    if clock is Clock.simulated or not on_device:
        ours = OurKernels(KernelBackend("simulate", generation(target), cores=lnc), lnc)
        return Plan(target, cases, [ours], SimulatedTimer(target), peak)
    device = {"native": "neuron", "xla": "xla"}[tier.stack]
    baselines, notes = nxd_kernels(cores=lnc)
    timer = HostClockTimer(device, waiter(device), repeats=repeats)
    ours = OurKernels(KernelBackend("nki", cores=lnc), lnc)
    every: list[Implementation] = [ours, *baselines]
    return Plan(target, cases, every, timer, peak, device, tuple(notes))


def _progress(done: int, total: int, what: str) -> None:
    """One line on a terminal, rewritten."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done:>3} of {total}  {what:<72}", end=end, file=sys.stderr, flush=True)


def _can_plot() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None
