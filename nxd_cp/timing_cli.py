"""`nxd-cp profile` and `nxd-cp trace`: which kernel is timed on what, said once for both.

Does: parse options and print what nxd_cp.simulators.timing.cli makes of them. Does not: time.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from nxd_cp.command_options import (
    Chip,
    ChipOption,
    HeadDimOption,
    HeadsOption,
    KvHeadsOption,
    make_folder,
    refuse_given,
)

OF_BLOCKS = ("queries", "keys", "mask", "heads", "kv_heads", "head_dim", "dtype")
OF_FUNCTIONS = ("array", "option", "lnc", "ranks", "values")


def _call(
    context: typer.Context,
    kernel: Annotated[
        str,
        typer.Argument(help="flash_fwd, flash_bwd, or any @nki.jit kernel as module:function."),
    ],
    chip: ChipOption = Chip.trn2,
    queries: Annotated[int, typer.Option(help="Our kernels: query rows of the block.")] = 1024,
    keys: Annotated[
        int | None, typer.Option(help="Our kernels: keys; default as many as queries.")
    ] = None,
    mask: Annotated[str, typer.Option(help="Our kernels: full, causal or strict.")] = "causal",
    heads: HeadsOption = 1,
    kv_heads: KvHeadsOption = 1,
    head_dim: HeadDimOption = 128,
    dtype: Annotated[str, typer.Option(help="Our kernels: bfloat16 or float32.")] = "bfloat16",
    array: Annotated[
        list[str] | None,
        typer.Option(help="module:function: an argument, [NAME=]128x512:bfloat16, in order."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="module:function: another argument, NAME=VALUE.")
    ] = None,
    lnc: Annotated[int, typer.Option(min=1, max=2, help="module:function: cores per rank.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="module:function: ranks.")] = 1,
    values: Annotated[
        bool, typer.Option(help="module:function: compute, for kernels that branch on data.")
    ] = False,
) -> Any:
    """The Block or Call that the options say."""
    from nxd_cp.simulators.attention_block import KERNELS
    from nxd_cp.simulators.timing.call import Call
    from nxd_cp.simulators.timing.cli import Block

    if ":" in kernel:
        refuse_given(context, OF_BLOCKS, f"expected with our own kernels only, got {kernel!r}")
        return Call(
            target=kernel,
            generation=chip.value,
            arrays=tuple(array or ()),
            options=tuple(option or ()),
            ranks=ranks,
            lnc=lnc,
            values=values,
        )
    if kernel not in KERNELS:
        raise ValueError(f"expected {', '.join(KERNELS)} or module:function, got {kernel!r}")
    refuse_given(context, OF_FUNCTIONS, f"expected with module:function only, got {kernel!r}")
    return Block(
        kernel=kernel,
        generation=chip.value,
        queries=queries,
        keys=queries if keys is None else keys,
        mask=mask,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )


def _timed(command: Callable[..., str]) -> Callable[..., None]:
    """A command of `_call`'s options and its own; its first parameter is the call, it is printed.

    A wrong call is a usage error; what the kernel itself raises is shown as it is.
    """
    shared, own = (get_type_hints(f, include_extras=True) for f in (_call, command))
    _, *parameters = inspect.signature(command).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in inspect.signature(_call).parameters}
        try:
            call = _call(**options)
            typer.echo(command(call, **given))
        except (ValueError, ImportError) as error:
            raise typer.BadParameter(str(error)) from error

    both = [*inspect.signature(_call).parameters.values(), *parameters]
    hints = {p.name: {**shared, **own}[p.name] for p in both}
    signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in both])
    del run.__wrapped__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


@_timed
def profile(
    call: Any,
    json: Annotated[
        Path | None, typer.Option(help="Also write the summary as JSON.", callback=make_folder)
    ] = None,
    roofline: Annotated[
        Path | None, typer.Option(help="Also draw a roofline PNG.", callback=make_folder)
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Also draw a timeline PNG.", callback=make_folder)
    ] = None,
) -> str:
    """Say where a kernel's time goes: estimated from its instructions, not measured.

    Examples: nxd-cp profile flash_fwd --queries 2048; nxd-cp profile my_kernels.py:scale
    --array 128x512:bfloat16 --option factor=2.
    """
    from nxd_cp.simulators.timing.cli import run_profile

    return run_profile(call, json_path=json, roofline=roofline, timeline=timeline)


@_timed
def trace(
    call: Any,
    out: Annotated[
        Path, typer.Option(help="File to write, JSON for ui.perfetto.dev.", callback=make_folder)
    ] = Path("trace.json"),
) -> str:
    """Write a kernel's estimated timeline for Perfetto.

    A process per rank and core; a lane per engine, DMA queue and collective; counters of memory and
    rates; arrows from what an instruction waited for. Options as in profile.
    """
    from nxd_cp.simulators.timing.cli import run_trace

    return run_trace(call, out)
