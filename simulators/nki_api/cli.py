"""nki-sim: run a Python script with `import nki` meaning the simulator.

    nki-sim --generation gen3 my_script.py its arguments

Does not change the environment of other processes; torch_xla and framework entry points of the
vendor's package are not simulated.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import chips
from .loading import install
from .params import SimParams, parameters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nki-sim", description="Run a script whose `import nki` is the NKI simulator."
    )
    parser.add_argument(
        "--generation",
        metavar="CHIP",
        help=f"trn1, trn2, trn3 or gen2, gen3, gen4 (default: {chips.TARGET_VARIABLE}, or gen4)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="rules of the inferred tier raise, too"
    )
    parser.add_argument(
        "--shape-only", action="store_true", help="check and log, but compute no values"
    )
    parser.add_argument("script", type=Path, help="the Python file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script as __main__; its own exit status counts. Returns 0.

    Exits with status 2 for an unknown generation, a missing script or a real nki.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"no script {options.script}")
    try:
        generation = chips.generation_name(options.generation)
        install()
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    before = os.environ.get(chips.TARGET_VARIABLE), sys.argv, sys.path
    os.environ[chips.TARGET_VARIABLE] = generation
    sys.argv = [str(options.script), *options.arguments]
    sys.path = [str(options.script.resolve().parent), *sys.path]
    try:
        with parameters(SimParams(strict=options.strict, values=not options.shape_only)):
            runpy.run_path(str(options.script), run_name="__main__")
    finally:
        _restore(*before)
    return 0


def _restore(target: str | None, argv: list[str], path: list[str]) -> None:
    sys.argv, sys.path = argv, path
    if target is None:
        del os.environ[chips.TARGET_VARIABLE]
    else:
        os.environ[chips.TARGET_VARIABLE] = target


if __name__ == "__main__":
    sys.exit(main())
