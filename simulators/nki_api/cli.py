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
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import chips
from .errors import NkiValidationError
from .loading import install
from .log import HELPERS
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
    """Run the script as __main__. Returns 0, or 1 after an exception of the script.

    A script that calls sys.exit ends with that status. Exits with status 2 for an unknown
    generation, a missing script or a real nki.
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
    except Exception as error:
        _show(error)
        return 1
    finally:
        _restore(*before)
    return 0


def _show(error: Exception) -> None:
    """The script's traceback, without the frames that run it or, for a broken rule, check it."""
    shown = traceback.TracebackException.from_exception(error)
    runners = {__file__, runpy.__file__, "<frozen runpy>"}
    if isinstance(error, NkiValidationError):
        runners |= HELPERS
    kept = [frame for frame in shown.stack if frame.filename not in runners]
    shown.stack = traceback.StackSummary.from_list(kept)
    print("".join(shown.format()), end="", file=sys.stderr)


def _restore(target: str | None, argv: list[str], path: list[str]) -> None:
    sys.argv, sys.path = argv, path
    if target is None:
        del os.environ[chips.TARGET_VARIABLE]
    else:
        os.environ[chips.TARGET_VARIABLE] = target


if __name__ == "__main__":
    sys.exit(main())
