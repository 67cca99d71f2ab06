"""`nxd-cp doctor`: the environment, the kernels' source, and the rings of a configuration."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nxd_cp.command_options import Instance, LncOption, make_folder

app = typer.Typer(help="Check this environment, a folder of kernels, or a ring.")


@app.callback(invoke_without_command=True)
def environment(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Without a command: packages, devices, and which backend is used here and why."""
    if context.invoked_subcommand is not None:
        return
    from nxd_cp.doctor.machine import look
    from nxd_cp.doctor.packages import find_all
    from nxd_cp.doctor.tier import decide

    packages, machine = find_all(), look()
    tier = decide(packages, machine)
    if as_json:
        found = {"packages": [asdict(p) for p in packages], "machine": asdict(machine)}
        typer.echo(json.dumps({**found, "tier": asdict(tier)}, indent=1))
        return
    typer.echo(f"{'package':<22}{'state':<13}{'version':<24}for")
    for p in packages:
        typer.echo(f"{p.name:<22}{p.state:<13}{p.version or '-':<24}{p.purpose}")
    instance = f" ({machine.instance})" if machine.instance else ""
    typer.echo(f"\ndevices: {machine.num_devices}{instance}, stack: {tier.stack}")
    for name, value in machine.variables.items():
        typer.echo(f"{name}={value}")
    typer.echo("\n".join(tier.reasons))
    typer.echo("ring: nxd-cp doctor ring --help checks one against the links of a chip")


@app.command()
def kernels(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of kernels; default: this package's own.")
    ] = None,
) -> None:
    """Name what at least one of NKI 0.2 to 0.6 rejects in a folder of kernels; exit 1 if any."""
    import nxd_cp
    from nxd_cp.portability import check_folder

    folder = path or Path(nxd_cp.__file__).parent / "kernels"
    if not folder.is_dir():
        raise typer.BadParameter(f"expected a folder, got {folder}")
    if next(folder.rglob("*.py"), None) is None:
        raise typer.BadParameter(f"expected a folder of kernels, got no Python file in {folder}")
    findings = check_folder(folder)
    for finding in findings:
        typer.echo(str(finding))
    typer.echo(f"{len(findings)} findings in {folder}")
    raise typer.Exit(1 if findings else 0)


@app.command()
def ring(
    chip: Annotated[Instance, typer.Option(help="The chip.")] = Instance.trn2,
    world: Annotated[int, typer.Option(min=1, help="Ranks in all (logical cores).")] = 64,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size, innermost.")] = 4,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel size.")] = 4,
    lnc: LncOption = 1,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Also write the hops for nccom-test, as JSON.", callback=make_folder),
    ] = None,
) -> None:
    """Say whether every hop of the context-parallel rings has a link; exit 1 if one has none.

    On an instance with neuron-ls its links are taken, elsewhere the 4 x 4 torus of trn1 and trn2.
    """
    from nxd_cp.doctor.machine import look
    from nxd_cp.doctor.ring import LINKS, check_ring

    machine = look()
    links = machine.links if machine.chip == chip.value else None
    sizes = {"tensor_parallel_size": tp, "context_parallel_size": cp}
    try:
        verdict = check_ring(chip=chip.value, world_size=world, lnc=lnc, links=links, **sizes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{chip.value}, {world} ranks, TP {tp} (innermost), CP {cp}, LNC {lnc}")
    if verdict.hops:
        counts = [(kind, sum(hop.link == kind for hop in verdict.hops)) for kind in LINKS]
        typer.echo("hops: " + ", ".join(f"{count} {kind}" for kind, count in counts if count))
        first = [verdict.hops[0].source] + [hop.target for hop in verdict.hops[: cp - 1]]
        typer.echo(f"first ring: {' -> '.join(map(str, first))} -> {first[0]}")
    if pairs is not None:
        hops = [[hop.source, hop.target] for hop in verdict.hops]
        pairs.write_text(json.dumps({"src_target_pairs": [hops]}) + "\n")
        typer.echo(f"nccom-test -r {world} --custom-src-target-pairs {pairs} permute")
    word = {True: "legal", False: "not legal", None: "unknown"}[verdict.legal]
    typer.echo(f"{word}: {verdict.text}" if cp > 1 else "legal: a ring of one sends nothing")
    raise typer.Exit(1 if verdict.legal is False else 0)
