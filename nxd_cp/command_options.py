"""Options that several commands of `nxd-cp` share, said once: chips, layouts, sizes, files.

Does: declare them for typer, and tell which were given. Does not: run anything.
"""

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Chip(str, Enum):
    """Chips with a cost model."""

    trn1 = "trn1"
    trn2 = "trn2"
    trn3 = "trn3"


class Instance(str, Enum):
    """Chips that an instance can have; inf2 has trn1's cores."""

    trn1 = "trn1"
    inf2 = "inf2"
    trn2 = "trn2"
    trn3 = "trn3"


class Layout(str, Enum):
    """How the sequence is dealt out to the ranks."""

    zigzag = "zigzag"
    striped = "striped"
    contiguous = "contiguous"


ChipOption = Annotated[Chip, typer.Option(help="Chip whose cost model is used.")]
LayoutOption = Annotated[Layout, typer.Option(help="How the sequence is dealt out to the ranks.")]
LncOption = Annotated[
    int, typer.Option(min=1, max=2, help="Physical cores of a logical core (of a launch).")
]
HeadsOption = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeadsOption = Annotated[int, typer.Option(min=1, help="Key and value heads.")]
HeadDimOption = Annotated[int, typer.Option(min=1, help="Head dim.")]


def make_folder(path: Path | None) -> Path | None:
    """The folder of a file that a command will write is made before the work begins.

    A path that no file can have is a usage error.
    """
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"expected a file, got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"expected a file that can be written: {error}") from error
    return path


def refuse_given(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """A usage error with `reason` if one of these parameters was given on the command line.

    An option that has no effect is refused and not ignored.
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{options}: {reason}")
