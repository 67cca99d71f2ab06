"""Groups of gloo ranks for tests: processes that wait for functions to run.

They are forked from a server process that has imported torch and computed nothing, so a group
costs a fraction of a second and inherits no threads. Functions must be importable (module level).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

# Of groups that a test may break: what a rank waits for the others, what a test may take.
GROUP_TIMEOUT_S = 3.0
BOUND_S = 20.0

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "nxd_cp.attention"])
# What ends a hang of the tests. A loaded machine starts slowly; no other limit counts from before.
_STARTUP_S = 100.0
_RUN_S = 90.0


@dataclass
class Failure:
    """What a rank raised (its type's name, text and traceback), or that it died."""

    kind: str
    text: str
    trace: str


class RankGroup:
    """`size` gloo ranks; `run` calls a function in the first few of them."""

    def __init__(self, size: int, *, group_timeout_s: float = 60.0):
        self.size, self.closed = size, False
        self._folder = tempfile.TemporaryDirectory(prefix="nxd_cp_ranks_")
        self._pipes: list[Connection] = []
        self._processes = []
        meeting = str(Path(self._folder.name) / "store")
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            args = (rank, size, meeting, group_timeout_s, theirs)
            process = _CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._meet(range(size))

    def run(self, fn: Callable[..., Any], *args: Any, num_ranks: int | None = None) -> list[Any]:
        """`fn(group, *args)` on ranks 0..num_ranks-1; results in rank order, or the first error."""
        outcomes = self.outcomes(fn, *args, num_ranks=num_ranks)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                raise AssertionError(f"rank {rank}: {outcome.kind}: {outcome.trace}")
        return outcomes

    def outcomes(
        self, fn: Callable[..., Any], *args: Any, num_ranks: int | None = None
    ) -> list[Any]:
        """As `run`, with a `Failure` in the place of each rank that raised or died."""
        num_ranks = self.size if num_ranks is None else num_ranks
        request = pickle.dumps((fn, args, num_ranks))
        for pipe in self._pipes[:num_ranks]:
            pipe.send_bytes(request)
        self._meet(range(num_ranks))
        for pipe in self._pipes[:num_ranks]:
            pipe.send_bytes(b"begin")
        deadline = monotonic() + _RUN_S
        return [self._receive(rank, deadline) for rank in range(num_ranks)]

    def _meet(self, ranks: range) -> None:
        """Wait until all have imported what they need, so that they begin together."""
        deadline = monotonic() + _STARTUP_S
        for rank in ranks:
            answer = self._receive(rank, deadline)
            assert answer == "ready", f"rank {rank} did not start: {answer}"

    def _receive(self, rank: int, deadline: float) -> Any:
        try:
            if self._pipes[rank].poll(max(0.0, deadline - monotonic())):
                return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            self.closed = True
            return Failure("died", f"exit code {self._processes[rank].exitcode}", "")
        self.close()
        raise AssertionError(f"rank {rank} gave no answer in time")

    def close(self) -> None:
        """End all ranks."""
        self.closed = True
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, meeting: str, timeout_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(meeting, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    dist.barrier()
    timeout = timedelta(seconds=timeout_s)  # a new group does not inherit it
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, size + 1)}
    ready = pickle.dumps("ready")
    pipe.send_bytes(ready)
    while True:
        try:
            fn, args, num_ranks = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(ready)
            pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        torch.manual_seed(1234)
        try:
            outcome = fn(groups[num_ranks], *args)
        except Exception as error:
            outcome = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))
