"""The command line: `nxd-cp --help` lists it; every command imports what it needs itself."""

from pathlib import Path
from typing import Annotated

import typer

import nxd_cp
from nxd_cp.bench.cli import app as bench
from nxd_cp.command_options import (
    Chip,
    ChipOption,
    HeadDimOption,
    HeadsOption,
    KvHeadsOption,
    Layout,
    LayoutOption,
    LncOption,
    make_folder,
)
from nxd_cp.doctor.cli import app as doctor
from nxd_cp.timing_cli import profile, trace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Context parallelism for AWS Neuron devices: ring attention over a split sequence.",
)

app.add_typer(bench, name="bench")
app.add_typer(doctor, name="doctor")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nxd-cp {nxd_cp.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plot and logs.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=2, help="Steps with the torch backend.")] = 60,
    seq_len: Annotated[int, typer.Option(help="Bytes of text per step, torch backend.")] = 2048,
    simulate_steps: Annotated[
        int, typer.Option(min=0, help="Steps with the simulated kernels; 0 leaves them out.")
    ] = 20,
    simulate_seq_len: Annotated[
        int, typer.Option(help="Bytes of text per step, simulated kernels.")
    ] = 1024,
    layout: LayoutOption = Layout.zigzag,
) -> None:
    """Train a small model on 1, 2 and 4 ranks and check that the losses agree.

    First with PyTorch's flash attention in every block, then with our NKI kernels in the simulator.
    One process per rank on this CPU, over gloo. Exits with status 1 if any loss disagrees, if the
    bytes sent are not those of the schedule, or if the loss does not fall.
    """
    if simulate_steps == 1:
        raise typer.BadParameter("expected 0 or at least 2 simulated steps: a loss falls in two")
    from nxd_cp.demo.main import run_demo

    try:
        ok = run_demo(
            out=out,
            steps=steps,
            seq_len=seq_len,
            simulate_steps=simulate_steps,
            simulate_seq_len=simulate_seq_len,
            layout=layout.value,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if ok else 1)


@app.command()
def plan(
    layout: LayoutOption = Layout.zigzag,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks in the context-parallel group.")] = 4,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the whole sequence; default 128 per run of tokens."),
    ] = None,
    causal: Annotated[bool, typer.Option(help="Causal mask, or every token sees all.")] = True,
    window: Annotated[
        int | None, typer.Option(help="Keys that each query sees, its own included; default all.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="ring, gather, heads, or auto: the cheapest by the rule.")
    ] = "auto",
    heads: HeadsOption = 32,
    kv_heads: KvHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank.")] = 1,
    chip: ChipOption = Chip.trn2,
    png: Annotated[
        Path | None, typer.Option(help="Also draw the comparison.", callback=make_folder)
    ] = None,
) -> None:
    """Print who computes which block of scores at each step, and what each strategy costs.

    The blocks are those of the strategy that is taken. Costs are estimates for bfloat16 on one chip
    per rank (docs/strategies.md says from what).
    """
    from nxd_cp.schedule import make_plan, padded_len, seq_len_multiple
    from nxd_cp.strategies.cost import Shape
    from nxd_cp.strategies.report import report

    tokens = 128 * seq_len_multiple(layout.value, ranks) if seq_len is None else seq_len
    shape = Shape(batch, heads, kv_heads, head_dim, itemsize=2)
    try:
        if heads % kv_heads:
            raise ValueError(f"kv-heads: expected a divisor of {heads} heads, got {kv_heads}")
        slots = padded_len(layout.value, ranks, tokens)
        ring = make_plan(
            layout.value, ranks, slots, num_tokens=tokens, causal=causal, window=window
        )
        text, costs = report(ring, shape, chip.value, strategy)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(costs[0].work.plan.table())
    typer.echo(text)
    if png is not None:
        from nxd_cp.strategies.draw import draw

        draw(costs, f"{layout.value}, {ranks} ranks, {tokens} tokens, {chip.value}", png)


app.command()(profile)
app.command()(trace)


@app.command()
def simulate(
    chip: ChipOption = Chip.trn2,
    ranks: Annotated[int, typer.Option(min=1, help="Positions of the ring.")] = 8,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the whole sequence.")] = 131072,
    layout: LayoutOption = Layout.zigzag,
    causal: Annotated[bool, typer.Option(help="Causal mask, or every token sees all.")] = True,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Logical cores of a position.")] = 4,
    lnc: LncOption = 2,
    pods: Annotated[bool, typer.Option(help="trn2 nodes joined to UltraServers.")] = False,
    heads: HeadsOption = 32,
    kv_heads: KvHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    channels: Annotated[int, typer.Option(help="Links used at once: 1, 2 or 4.")] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(help="Sustained TFLOP/s of a position; default: time our kernels."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also write a Perfetto trace.", callback=make_folder)
    ] = None,
) -> None:
    """Estimate a ring on simulated chips: step time, exposed communication, efficiency."""
    from nxd_cp.simulators.cluster.cli import Ring, run_simulate

    ring = Ring(
        generation=chip.value,
        ranks=ranks,
        seq_len=seq_len,
        layout=layout.value,
        causal=causal,
        tensor_parallel=tensor_parallel,
        lnc=lnc,
        pods=pods,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        channels=channels,
        tflops=tflops,
    )
    try:
        typer.echo(run_simulate(ring, trace_path=trace))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def main() -> None:
    """The entry point `nxd-cp`."""
    app()


if __name__ == "__main__":
    main()
