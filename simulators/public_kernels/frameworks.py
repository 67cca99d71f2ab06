"""Stand-ins for torch_xla, so that the documentation's PyTorch scripts run on the simulator.

`device()` is the CPU, `sync()` does nothing; `spawn(fn)` runs fn(rank) for all ranks of one
kernel in threads, one at a time, and a kernel that every rank has called runs on all ranks at
once. Covers what the public scripts use, and nothing else.

Source: torch_xla (device, sync, core.xla_model, distributed.xla_multiprocessing, runtime).
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from nxd_cp.simulators import nki_api
from nxd_cp.simulators.nki_api.runtime import current_or_none

WORLD_SIZE = 8  # the scripts of many ranks are written for one device of 8 cores
_RANK = threading.local()
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Group:
    """Ranks as threads: one runs at a time, all meet in a kernel call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.baton = threading.Condition()
        self.turn = 0
        self.calls: dict[int, Call] = {}
        self.results: list[Any] = []
        self.ended: list[int] = []
        self.errors: list[BaseException] = []

    def call(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One rank's call of a kernel; returns when all ranks have called and it has run."""
        rank, turn = _RANK.value, self.turn
        self.calls[rank] = (kernel, args, kwargs)
        if len(self.calls) == self.size:
            self._launch()
        while self.turn == turn:
            if self.ended:
                raise RuntimeError(f"rank {rank} waits in {kernel}; rank {self.ended[0]} has ended")
            self.baton.wait()
        return self.results[rank]

    def _launch(self) -> None:
        calls = [self.calls[rank] for rank in range(self.size)]
        names = list(inspect.signature(calls[0][0].function).parameters)
        given = [{**dict(zip(names, a, strict=False)), **k} for _, a, k in calls]
        self.results = nki_api.simulate_ranks(calls[0][0], given)
        self.calls = {}
        self.turn += 1
        self.baton.notify_all()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """function(rank, *args) on every rank; raises the first error of any."""
        threads = [
            threading.Thread(target=self._one, args=(rank, function, args))
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _one(self, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        _RANK.value, _RANK.group = rank, self
        with self.baton:
            try:
                function(rank, *args)
            except BaseException as error:
                self.errors.append(error)
            finally:
                self.ended.append(rank)
                self.baton.notify_all()


def spawn(function: Callable[..., Any], args: tuple[Any, ...] = (), **options: Any) -> None:
    """torch_xla.distributed.xla_multiprocessing.spawn on WORLD_SIZE simulated ranks."""
    Group(WORLD_SIZE).run(function, args)


def _meet_in_kernels() -> None:
    alone = nki_api.Kernel.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = getattr(_RANK, "group", None)
        if group is None or current_or_none() is not None:
            return alone(self, *args, **kwargs)
        return group.call(self, args, kwargs)

    nki_api.Kernel.__call__ = call  # type: ignore[method-assign]


def _module(name: str, **values: Any) -> types.ModuleType:
    module = types.ModuleType(name, "Part of a stand-in for torch_xla.")
    module.__path__ = []
    module.__dict__.update(values)
    sys.modules[name] = module
    return module


def provide() -> None:
    """Make the stand-ins importable in this process."""
    import torch

    cpu = torch.device("cpu")

    def nothing(*args: Any, **kwargs: Any) -> None:
        """There is nothing to wait for."""

    xm = _module("torch_xla.core.xla_model", xla_device=lambda: cpu, mark_step=nothing)
    xmp = _module("torch_xla.distributed.xla_multiprocessing", spawn=spawn)
    runtime = _module("torch_xla.runtime", world_size=lambda: WORLD_SIZE)
    core = _module("torch_xla.core", xla_model=xm)
    distributed = _module("torch_xla.distributed", xla_multiprocessing=xmp)
    parts = {"core": core, "distributed": distributed, "runtime": runtime}
    _module("torch_xla", device=lambda: cpu, sync=nothing, **parts)
    _meet_in_kernels()
