"""A call of any kernel, run in the simulator for its log: what `nxd-cp profile` and `trace` take.

Does: parse "module:function" and array shapes, run on zeros, on several ranks and cores if asked.
Does not: time anything, or parse a command line.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import (
    SimParams,
    load,
    parameters,
    record,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api.log import Log

from .constants import constants_for

ARRAY = re.compile(r"(?:(\w+)=)?(\d+(?:x\d+)*):(\w+)")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel and its arguments.

    target: "module:function", the module by its dotted name or its file. arrays: "128x512:bfloat16"
    or "name=128x512:bfloat16", in order, filled with zeros. options: "name=value", the value a
    Python literal or else text. lnc: cores per rank. values: also do the arithmetic, for kernels
    whose control flow depends on data.
    """

    target: str
    generation: str = "trn2"
    arrays: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    ranks: int = 1
    lnc: int = 1
    values: bool = False

    def run(self) -> Log:
        """The log of core 0; `.cores` has all.

        Raises ValueError for a target, array or option that is not one; ModuleNotFoundError, or
        whatever the kernel raises.
        """
        function = self._function()
        positional, named = [], {}
        for text in self.arrays:
            name, array = parse_array(text)
            if name:
                named[name] = array
            else:
                positional.append(array)
        named.update(parse_option(text) for text in self.options)
        _check_arguments(self.target, function, positional, named)
        generation = constants_for(self.generation).generation
        quiet = redirect_stdout(io.StringIO())  # kernels may print; standard output is the table's
        with quiet, parameters(SimParams(values=self.values)), record() as log:
            if self.ranks == 1:
                launched = function[self.lnc] if self.lnc > 1 else function
                launched(*positional, **named)
            else:
                names = positional_names(function, len(positional))
                given = {**dict(zip(names, positional, strict=True)), **named}
                simulate_ranks(function, [given] * self.ranks, lnc=self.lnc, generation=generation)
        return log

    def _function(self) -> Any:
        place, colon, name = self.target.rpartition(":")
        if not colon or not place or not name:
            raise ValueError(
                f"kernel: expected flash_fwd, flash_bwd or module:function, got {self.target!r}"
            )
        module = _module(place, constants_for(self.generation).generation)
        function = getattr(module, name, None)
        if function is None or not hasattr(function, "__getitem__"):
            raise ValueError(f"kernel: expected an @nki.jit function in {place}, got {name!r}")
        return function


def _check_arguments(
    target: str, function: Any, positional: list[Any], named: dict[str, Any]
) -> None:
    """ValueError where the arguments are not those of the kernel."""
    signature = inspect.signature(function)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"{target}: expected arguments {signature}, got {len(positional)} unnamed and "
            f"{sorted(named)} ({error}); add --array SHAPE:DTYPE or --option NAME=VALUE"
        ) from error


def positional_names(function: Any, count: int) -> list[str]:
    """Names of a kernel's first `count` parameters."""
    return list(inspect.signature(function).parameters)[:count]


def _module(place: str, generation: str) -> Any:
    """A module by dotted name or file, from the working directory or the path."""
    path = Path(place)
    folder = str(path.parent.resolve()) if place.endswith(".py") else str(Path.cwd())
    if place.endswith(".py"):
        place = path.stem
    sys.path.insert(0, folder)
    try:
        try:
            return load(place, generation=generation)
        except ImportError:
            top, dot, rest = place.partition(".")
            if not dot:
                raise
            return load(top, generation=generation, module=rest)  # it imports from its package
    finally:
        sys.path.remove(folder)


def parse_array(text: str) -> tuple[str, Any]:
    """("name" or "", zeros) of "128x512:bfloat16" or "name=128x512:bfloat16"."""
    found = ARRAY.fullmatch(text)
    if found is None:
        raise ValueError(f"array: expected SHAPE:DTYPE such as 128x512:bfloat16, got {text!r}")
    name, shape, dtype = found.groups()
    dims = tuple(int(count) for count in shape.split("x"))
    return name or "", np.zeros(dims, _dtype(dtype))


def _dtype(name: str) -> Any:
    import ml_dtypes

    kind = getattr(ml_dtypes, name, None)
    try:
        return np.dtype(kind if kind is not None else name)
    except TypeError as error:
        raise ValueError(
            f"dtype: expected one of NumPy or ml_dtypes such as bfloat16, got {name!r}"
        ) from error


def parse_option(text: str) -> tuple[str, Any]:
    """(name, value) of "causal_mask=True"; what is no Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"option: expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
