"""How a job's process groups can carry hops: found out by trying, and agreed by all ranks.

Does: try send and receive round all ranks in a group of its own, then all_to_all_single, and let
all ranks agree after each try, so that no two ranks ever choose differently. Does not: keep the
result; one probe serves all contexts of a job.

Note [Why it cannot half-fail]
    A try that fails may leave a group unusable, and may fail on some ranks alone. So it runs in a
    new group with a short timeout, every error in it counts as "no", and the verdicts meet in one
    all_reduce over the default group, which every rank reaches after at most that timeout. "p2p" or
    "all_to_all" is the answer only when it worked on every rank of the job.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from nxd_cp.transport.errors import RingError

PROBE_TIMEOUT_S = 30.0
_SIZE_BYTES = 64  # of the test message


def probe(*, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """ "p2p" or "all_to_all", the same on every rank; the first that works.

    Every process of the job calls it, also those outside the group of interest. It tries the
    default group's backend. Raises RingError, on every rank, when neither works or when the ranks
    cannot even agree: one is gone.
    """
    for name, attempt in (("p2p", _p2p), ("all_to_all", _all_to_all)):
        if _all_say(_works(attempt, timeout_s)):
            return name
    raise RingError(
        f"rank {dist.get_rank()}: expected a backend with send and receive or with "
        f"all_to_all_single, got {dist.get_backend()}, which lacks both on some rank"
    )


def _works(attempt: Callable[[dist.ProcessGroup], bool], timeout_s: float) -> bool:
    """One try in a group of its own; any error is a no."""
    trial = dist.new_group(timeout=timedelta(seconds=timeout_s), backend=dist.get_backend())
    try:
        return attempt(trial)
    except (RuntimeError, ValueError, NotImplementedError):
        return False


def _all_say(mine: bool) -> bool:
    verdict = torch.tensor([int(mine)], dtype=torch.int32, device=_device())
    try:
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    except RuntimeError as error:
        raise RingError(
            f"rank {dist.get_rank()}: the ranks could not agree on how to exchange messages; a "
            f"rank is gone or late: {error}"
        ) from error
    return bool(verdict.item())


def _p2p(trial: dist.ProcessGroup) -> bool:
    """Once round the ring; what comes in must be what the left neighbour sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out, into = _message(rank), _message(rank)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, out, (rank + 1) % size, trial),
            dist.P2POp(dist.irecv, into, (rank - 1) % size, trial),
        ]
    )
    for work in works:
        work.wait()
    return _came_from(into, (rank - 1) % size)


def _all_to_all(trial: dist.ProcessGroup) -> bool:
    """As `_p2p`, by one collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out, into = _message(rank), _message(rank)
    sends, receives = ([0] * size for _ in range(2))
    sends[(rank + 1) % size] = receives[(rank - 1) % size] = _SIZE_BYTES
    dist.all_to_all_single(into, out, receives, sends, group=trial)
    return _came_from(into, (rank - 1) % size)


def _message(rank: int) -> torch.Tensor:
    return torch.full((_SIZE_BYTES,), rank % 251, dtype=torch.uint8, device=_device())


def _came_from(message: torch.Tensor, rank: int) -> bool:
    return bool((message == rank % 251).all())


def _device() -> torch.device:
    """Where messages lie: gloo and MPI take the CPU's, other backends an accelerator's."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend() in ("gloo", "mpi"):
        return torch.device("cpu")
    return accelerator
