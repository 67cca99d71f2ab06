"""nki.jit, nki.simulate and the Kernel that they make; simulate_ranks for many ranks.

Calling a kernel runs its Python at once, instruction by instruction, on fresh cores. A kernel
called inside another kernel is an ordinary function call.

Source: nki.jit, nki.simulate.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from . import chips
from .front_end import check_kernel, check_nested
from .params import parameters_in_force
from .ranks.launch import Arguments, launch
from .runtime import current_or_none
from .schedule import edges_of, scheduled

BOUND_GENERATION: ContextVar[str | None] = ContextVar("nki_simulator_generation", default=None)


class Kernel:
    """A simulated kernel. `kernel[lnc]` sets the number of cores; `generation` may be fixed."""

    def __init__(
        self, function: Callable[..., Any], generation: str | None = None, lnc: int | None = None
    ) -> None:
        self.function = function
        self.generation = generation
        self.lnc = lnc  # None: no grid, which is one core
        functools.update_wrapper(self, function)

    def __getitem__(self, lnc: Any) -> Kernel:
        degree = lnc[0] if isinstance(lnc, tuple) and len(lnc) == 1 else lnc
        if degree not in (1, 2):
            raise ValueError(f"expected kernel[1] or kernel[2], got kernel[{lnc!r}]")
        return Kernel(self.function, self.generation, int(degree))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        strict = parameters_in_force().strict
        if current_or_none() is not None:
            check_nested(self.function, strict)
            return self.function(*args, **kwargs)
        check_kernel(self.function, args, kwargs, strict)
        generation = chips.generation_name(self.generation)
        return launch(self.function, generation, [Arguments(args, kwargs)], self.lnc)[0]

    def with_schedule(self, schedule: Iterable[Any]) -> Kernel:
        """The kernel with edges (consumer, producer or list of producers) of instruction names."""
        function = scheduled(self.function, edges_of(schedule))
        return Kernel(function, self.generation, self.lnc)

    def __repr__(self) -> str:
        return f"<simulated kernel {getattr(self.function, '__qualname__', self.function)!s}>"


def jit(fn: Any = None, **kwargs: Any) -> Any:
    """Make a Kernel of a function; works with and without parentheses.

    Options of older versions are ignored: `mode` with a DeprecationWarning, compiler options in
    silence. Raises TypeError for platform_target, which NKI 0.3 removed (NKI migration guide).
    """
    if "platform_target" in kwargs:
        raise TypeError(
            f"nki.jit takes no platform_target since NKI 0.3; set {chips.TARGET_VARIABLE} or "
            "pass generation= to load()"
        )
    if "mode" in kwargs:
        text = "nki.jit(mode=...) is ignored since NKI 0.3; remove it"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    if fn is None:
        return jit
    return Kernel(fn, BOUND_GENERATION.get())


def simulate(kernel: Any) -> Kernel:
    """The kernel itself (it is simulated already), or a Kernel around a plain function."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel, BOUND_GENERATION.get())


def simulate_ranks(
    kernel: Any,
    arguments: Sequence[Sequence[Any] | Mapping[str, Any]],
    *,
    lnc: int | None = None,
    generation: str | None = None,
) -> list[Any]:
    """Run a kernel on len(arguments) ranks at once; the outputs of each rank, in rank order.

    kernel: an @nki.jit kernel or a plain function.
    arguments: per rank, a tuple of positional arguments or a dict of named ones; arrays may differ
        between ranks, each rank has its own HBM.
    lnc: cores per rank, 1 or 2; by default what kernel[lnc] says, else 1.
    generation: as in `load`; by default the kernel's, else the environment's.
    Raises what any rank raises (its traceback, with a note of rank and core), NkiDeadlockError
    when ranks wait for each other, ValueError for arguments that are neither tuples nor dicts.
    """
    made = simulate(kernel) if lnc is None else simulate(kernel)[lnc]
    calls = [_arguments(rank, given) for rank, given in enumerate(arguments)]
    if not calls:
        raise ValueError("expected the arguments of at least one rank, got none")
    if current_or_none() is not None:
        raise RuntimeError("simulate_ranks cannot be called inside a kernel")
    for call in calls:
        check_kernel(made.function, call.args, call.kwargs, parameters_in_force().strict)
    return launch(
        made.function, chips.generation_name(generation or made.generation), calls, made.lnc
    )


def _arguments(rank: int, given: Any) -> Arguments:
    if isinstance(given, Mapping):
        return Arguments((), dict(given))
    if isinstance(given, (tuple, list)):
        return Arguments(tuple(given), {})
    raise ValueError(
        f"expected a tuple or dict of arguments for rank {rank}, got {type(given).__name__}; "
        "pass (array,) for a single one"
    )
