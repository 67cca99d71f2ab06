"""Launching a kernel: arguments in, every core of every rank run to its end, results out.

Each rank gets its own arguments; the cores of a rank share their arrays and run the same function.
Outputs are those of core 0, complete only once every core has ended. An exception of any core is
raised to the caller and nothing is returned.

Source: nki.jit (grid); Logical NeuronCores guide; nki.simulate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import chips
from nxd_cp.simulators.nki_api.errors import blamed, definition, fail, placed, strictness
from nxd_cp.simulators.nki_api.interop import arrays_in, as_numpy, is_torch, to_device, to_host
from nxd_cp.simulators.nki_api.log import Log
from nxd_cp.simulators.nki_api.params import parameters_in_force
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, recorder, running
from nxd_cp.simulators.nki_api.tensor import NkiTensor
from nxd_cp.simulators.nki_api.watchdog import watched

from .program import compare
from .scheduler import Place
from .world import World

_GRID = documented(
    "kernel.grid",
    "Logical NeuronCores guide",
    "a kernel runs on 1 core, or on 2 on gen3 and newer",
)
_SAME_OUTPUTS = documented(
    "kernel.same_outputs",
    "Logical NeuronCores guide",
    "both cores return the same tensors, in shared HBM",
)


@dataclass(frozen=True)
class Arguments:
    """One rank's arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def launch(
    function: Callable[..., Any], generation: str, calls: Sequence[Arguments], grid: int | None
) -> list[Any]:
    """Run `function` on len(calls) ranks of `grid` cores (None: one, without a grid)."""
    params = parameters_in_force()
    chip = chips.chip_for(generation)
    if (grid or 1) > (2 if chip.number > 2 else 1):
        fail(_GRID, "nki.jit", f"kernel[{grid}] on {chip.generation}")
    world = World(chip, len(calls), grid or 1, params.adversarial)
    world.has_grid = grid is not None
    _separate(world, calls)
    first_log = recorder()
    if first_log is None and params.log:
        first_log = Log()
    after: list[Callable[[], None]] = []
    results: dict[Place, Any] = {}
    traces: dict[Place, Any] = {}

    def body(place: Place) -> None:
        call = calls[place.rank]
        log = None if first_log is None else first_log.of_core(place.rank, place.core)
        with running(world, place, params, log) as run:
            names = _parameter_names(function, len(call.args))
            pairs = zip(call.args, names, strict=True)
            args = [to_device(run, value, name, after) for value, name in pairs]
            kwargs = {k: to_device(run, v, k, after) for k, v in call.kwargs.items()}
            with watched(params.stall_seconds, lambda: _progress(run), function):
                results[place] = function(*args, **kwargs)
            run.core.check_lifetimes()
            traces[place] = run.trace

    world.scheduler.run(body)
    with (
        strictness(params.strict, params.tolerated()),
        blamed(definition(function), function),
    ):
        for i, rank in enumerate(world.ranks):
            for watch in rank.watches:
                watch.land()
            if world.lnc == 2:
                compare(i, traces[Place(i, 0)], traces[Place(i, 1)])
        outputs = [_outputs(world, i, call, results, function) for i, call in enumerate(calls)]
    for action in after:
        action()
    return outputs


def _separate(world: World, calls: Sequence[Arguments]) -> None:
    """Copy arrays that several ranks were given: each rank has an HBM of its own."""
    if len(calls) == 1:
        return
    given = [
        (rank, value, as_numpy(value))
        for rank, call in enumerate(calls)
        for value in arrays_in([list(call.args), call.kwargs])
    ]
    for rank, value, array in given:
        others = (other for owner, _, other in given if owner != rank)
        if any(_overlap(array, other) for other in others):
            world.ranks[rank].copies[id(value)] = np.array(array, order="C", copy=True)


def _overlap(a: Any, b: Any) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _progress(run: Run) -> int | None:
    """How far a core is, for the watchdog; None while it waits for others."""
    return None if run.world.scheduler.waits(run.place) else run.issued


def _outputs(
    world: World, rank: int, call: Arguments, results: dict[Place, Any], function: Any
) -> Any:
    first = results[Place(rank, 0)]
    for core in range(1, world.lnc):
        other = results[Place(rank, core)]
        if _identity(first) != _identity(other):
            fail(_SAME_OUTPUTS, "nki.jit", f"rank {rank}: the cores return different results")
    as_torch = any(is_torch(value) for value in arrays_in([list(call.args), call.kwargs]))
    with placed(f"rank {rank}: " if world.num_ranks > 1 else ""):
        return to_host(first, as_torch, function)


def _identity(value: Any) -> Any:
    """What must be equal in the results of two cores."""
    if isinstance(value, NkiTensor):
        return id(value.storage), value.shape, value.strides, value.offset, value.dtype
    if type(value) in (tuple, list):
        return [_identity(v) for v in value]
    if type(value) is dict:
        return {k: _identity(v) for k, v in value.items()}
    return value


def _parameter_names(function: Callable[..., Any], count: int) -> list[str]:
    names = list(inspect.signature(function).parameters)[:count]
    return names + [f"arg{i}" for i in range(len(names), count)]
