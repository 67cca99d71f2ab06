"""How a job's process groups can carry hops: found out by trying, and agreed by all ranks.

Does: try send and receive round all ranks in a group of its own, then all_to_all_single, and let
all ranks agree after each try, so that no two ranks ever choose differently. Does not: keep the
result or the groups; one probe serves all contexts of a job.

Note [Why it cannot half-fail]
    A try that fails may leave a group unusable, and may fail on some ranks alone. So it runs in a
    new group with a short timeout; every error in it, also in making the group, is a reason for
    "no"; and the reasons meet in one all_reduce over the default group, which every rank reaches
    after at most that timeout. "p2p" or "all_to_all" is the answer only when it worked on every
    rank of the job. Arguments meet in the same way before the first group is made, because a rank
    that makes one group fewer than the others has other names for all that follow. Groups are
    destroyed when all ranks have spoken: before that a neighbour may still be receiving.
    What is left is a rank that dies in the all_reduce itself: it may end well on some ranks and
    not on others. These raise here, and the others in their first hop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from nxd_cp import validation
from nxd_cp.transport.distributed import message_device
from nxd_cp.transport.errors import RankMismatchError, RingError

PROBE_TIMEOUT_S = 30.0
_SIZE_BYTES = 64  # of the test message
_REASON_BYTES = 200
_NOBODY = -1  # the sender of a message that has not come


def probe(*, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """ "p2p" or "all_to_all", the same on every rank; the first that works.

    Every process of the job calls it, also those outside the group of interest. It tries the
    default group's backend; timeout_s is that of one try.
    Raises ValueError, on every rank, for a timeout that is none. Raises RingError, on every rank,
    when neither way works, with the reasons; or when the ranks cannot agree: one is gone.
    """
    refusal = _refusal(timeout_s)
    refusals = _meet("" if refusal is None else str(refusal))
    if refusal is not None:
        raise refusal
    if refusals:
        raise RankMismatchError(f"probe: {'; '.join(refusals)} (this is rank {dist.get_rank()})")
    failures = []
    for name, attempt in (("p2p", _p2p), ("all_to_all", _all_to_all)):
        with contextlib.ExitStack() as after:
            reasons = _meet(_try(attempt, timeout_s, after))
        if not reasons:
            return name
        failures.append(f"{name} failed: {'; '.join(reasons)}")
    raise RingError(
        f"rank {dist.get_rank()}: expected a backend with send and receive or with "
        f"all_to_all_single, got {dist.get_backend()}, which lacks both on some rank; "
        f"{'. '.join(failures)}"
    )


def _refusal(timeout_s: float) -> ValueError | None:
    try:
        validation.validate_seconds("timeout_s", timeout_s)
    except ValueError as error:
        return error
    return None


def _try(
    attempt: Callable[[dist.ProcessGroup], None], timeout_s: float, after: contextlib.ExitStack
) -> str:
    """Why this rank's try in a group of its own failed; "" when it worked. after: destroys it."""
    try:
        trial = dist.new_group(timeout=timedelta(seconds=timeout_s), backend=dist.get_backend())
        after.callback(_destroy, trial)
        attempt(trial)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _destroy(trial: dist.ProcessGroup) -> None:
    """The verdict stands, so an error here must not end one rank alone: what is left is memory."""
    with contextlib.suppress(Exception):
        dist.destroy_process_group(trial)


def _meet(reason: str) -> list[str]:
    """The reasons of all ranks that have one, each with its rank; the same on every rank."""
    try:
        text = torch.tensor([*reason.encode()[:_REASON_BYTES]], dtype=torch.int32)
        table = torch.zeros(dist.get_world_size(), _REASON_BYTES, dtype=torch.int32)
        table[dist.get_rank(), : len(text)] = text
        table = table.to(message_device())
        dist.all_reduce(table)
        rows = table.cpu().tolist()
    except Exception as error:
        raise RingError(
            f"rank {dist.get_rank()}: the ranks could not agree on how to exchange messages; a "
            f"rank is gone or late: {error}"
        ) from error
    said = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return [f"rank {rank}: {one}" for rank, one in enumerate(said) if one]


def _p2p(trial: dist.ProcessGroup) -> None:
    """Once round the ring; what comes in must be what the left neighbour sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out, into = _message(rank), _message(_NOBODY)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, out, (rank + 1) % size, trial),
            dist.P2POp(dist.irecv, into, (rank - 1) % size, trial),
        ]
    )
    for work in works:
        work.wait()
    _check_origin(into, (rank - 1) % size)


def _all_to_all(trial: dist.ProcessGroup) -> None:
    """As `_p2p`, by one collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out, into = _message(rank), _message(_NOBODY)
    sends, receives = ([0] * size for _ in range(2))
    sends[(rank + 1) % size] = receives[(rank - 1) % size] = _SIZE_BYTES
    dist.all_to_all_single(into, out, receives, sends, group=trial)
    _check_origin(into, (rank - 1) % size)


def _message(rank: int) -> torch.Tensor:
    return torch.full((_SIZE_BYTES,), _mark(rank), dtype=torch.uint8, device=message_device())


def _mark(rank: int) -> int:
    return 255 if rank == _NOBODY else rank % 255


def _check_origin(message: torch.Tensor, rank: int) -> None:
    if not bool((message == _mark(rank)).all()):
        raise RuntimeError(f"expected the message of rank {rank}, got another")
