"""nki.jit, nki.simulate and the Kernel that they make.

Calling a kernel runs its Python at once, instruction by instruction, on a fresh core. A kernel
called inside another kernel is an ordinary function call. Only one core per call so far.

Source: nki.jit, nki.simulate.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import chips
from .errors import unsupported
from .interop import is_torch, to_device, to_host
from .runtime import current_or_none, running

BOUND_GENERATION: ContextVar[str | None] = ContextVar("nki_simulator_generation", default=None)


class Kernel:
    """A simulated kernel. `kernel[lnc]` sets the number of cores; `generation` may be fixed."""

    def __init__(
        self, function: Callable[..., Any], generation: str | None = None, lnc: int = 1
    ) -> None:
        self.function = function
        self.generation = generation
        self.lnc = lnc
        functools.update_wrapper(self, function)

    def __getitem__(self, lnc: Any) -> Kernel:
        degree = lnc[0] if isinstance(lnc, tuple) and len(lnc) == 1 else lnc
        if degree not in (1, 2):
            raise ValueError(f"expected kernel[1] or kernel[2], got kernel[{lnc!r}]")
        return Kernel(self.function, self.generation, int(degree))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_or_none() is not None:
            return self.function(*args, **kwargs)
        if self.lnc != 1:
            unsupported("kernels on two cores (kernel[2])")
        with running(chips.generation_name(self.generation)) as run:
            after: list[Callable[[], None]] = []
            names = _parameter_names(self.function, len(args))
            device_args = [to_device(run, a, n, after) for a, n in zip(args, names, strict=True)]
            device_kwargs = {k: to_device(run, v, k, after) for k, v in kwargs.items()}
            result = self.function(*device_args, **device_kwargs)
            as_torch = any(is_torch(a) for a in (*args, *kwargs.values()))
            outputs = to_host(result, as_torch)
            for copy_back in after:
                copy_back()
            return outputs

    def __repr__(self) -> str:
        return f"<simulated kernel {getattr(self.function, '__qualname__', self.function)!s}>"


def _parameter_names(function: Callable[..., Any], count: int) -> list[str]:
    names = list(inspect.signature(function).parameters)[:count]
    return names + [f"arg{i}" for i in range(len(names), count)]


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
