"""The command line: `nxd-cp demo` and `nxd-cp plan`; every command imports what it needs itself."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Context parallelism for AWS Neuron devices: ring attention over a split sequence.",
)


class Layout(str, Enum):
    """How the sequence is dealt out to the ranks."""

    zigzag = "zigzag"
    striped = "striped"
    contiguous = "contiguous"


LayoutOption = Annotated[Layout, typer.Option(help="How the sequence is dealt out to the ranks.")]


@app.callback()
def _root() -> None:
    """Kept so that a command's name is always typed."""


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
        typer.Option(help="Tokens of the whole sequence; default 128 per run of tokens."),
    ] = None,
    causal: Annotated[bool, typer.Option(help="Causal mask, or every token sees all.")] = True,
) -> None:
    """Print who computes which block of scores at each step of the ring, and what is sent."""
    from nxd_cp.schedule import make_plan, seq_len_multiple

    tokens = 128 * seq_len_multiple(layout.value, ranks) if seq_len is None else seq_len
    try:
        typer.echo(make_plan(layout.value, ranks, tokens, causal=causal).table())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def main() -> None:
    """The entry point `nxd-cp`."""
    app()


if __name__ == "__main__":
    main()
