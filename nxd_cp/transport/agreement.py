"""Before a call computes anything, the ranks tell each other what they were asked to do.

Does: send a small description of fixed size once round all ranks and raise RankMismatchError on
every rank, with every value and who gave it, when two differ; or tell the others that this rank was
asked for something it cannot do, and why, so that they raise at once and not after a timeout.
Does not: compare the data itself.
Cost per rank and call: n - 1 messages of `AGREEMENT_BYTES` on channel "agreement".
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from nxd_cp.schedule import HEADER_BYTES, ring_moves
from nxd_cp.transport.call import Call
from nxd_cp.transport.errors import RankMismatchError

_DESCRIPTION_BYTES = 1024
_REASON_CHARACTERS = 400  # JSON may double them
_REFUSAL = "refuses"
AGREEMENT_BYTES = _DESCRIPTION_BYTES + HEADER_BYTES

Description = Mapping[str, str | int | float]


def check_agreement(call: Call, description: Description) -> None:
    """Raise RankMismatchError on all ranks unless all gave the same description.

    description: at most 1 kB as JSON.
    """
    said = _exchange(call, description)
    where = f"(this is rank {call.transport.rank})"
    refusals = [
        f"rank {rank} refuses: {one[_REFUSAL]}" for rank, one in enumerate(said) if _REFUSAL in one
    ]
    if refusals:
        raise RankMismatchError(
            f"ring call {call.number} ({call.kind}): {'; '.join(refusals)} {where}"
        )
    differences = _differences(said)
    if differences:
        raise RankMismatchError(
            f"ring call {call.number} ({call.kind}): expected the same arguments on all "
            f"{len(said)} ranks, got {'; '.join(differences)} {where}"
        )


def announce_refusal(call: Call, reason: str) -> None:
    """Take part in the others' `check_agreement` with a refusal; the caller then raises its own."""
    text = reason.encode("unicode_escape").decode("ascii")[:_REASON_CHARACTERS]
    _exchange(call, {_REFUSAL: text})


def _exchange(call: Call, description: Description) -> list[Description]:
    """What every rank said, in rank order. Messages go by rank: the ring's order may differ too."""
    rank, order = call.transport.rank, tuple(range(call.transport.size))
    text = json.dumps(dict(description)).encode("ascii").ljust(_DESCRIPTION_BYTES)
    assert len(text) == _DESCRIPTION_BYTES, f"description of {len(text)} bytes is too long"
    parcel = call.parcel("agreement", (_DESCRIPTION_BYTES,), torch.uint8, call.transport.device)
    parcel.payload.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    said: dict[int, Description] = {rank: description}
    for move in ring_moves(order, rank):
        payload = call.start(parcel, move).wait()
        said[parcel.owner] = json.loads(bytes(payload.tolist()))
    return [said[rank] for rank in sorted(said)]


def _differences(said: list[Description]) -> list[str]:
    """One line per field whose values differ, the most common value first."""
    lines = []
    for name in said[0].keys() | {name for one in said for name in one}:
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(said):
            by_value.setdefault(str(one.get(name, "nothing")), []).append(rank)
        if len(by_value) > 1:
            ordered = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[1]))
            lines.append(
                f"{name} = " + ", ".join(f"{value} on rank {_ranks(r)}" for value, r in ordered)
            )
    return sorted(lines)


def _ranks(ranks: list[int]) -> str:
    return " and ".join(map(str, ranks))
