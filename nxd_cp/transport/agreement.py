"""Before a call computes anything, the ranks tell each other what they were asked to do.

Does: send a small description of fixed size once round the ring and raise RankMismatchError on
every rank, with every value and who gave it, when two differ. Does not: compare the data itself.
Cost per rank and call: n - 1 messages of `AGREEMENT_BYTES` on channel "agreement".
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from nxd_cp.schedule import HEADER_BYTES, Plan
from nxd_cp.transport.call import Call
from nxd_cp.transport.errors import RankMismatchError

_DESCRIPTION_BYTES = 1024
AGREEMENT_BYTES = _DESCRIPTION_BYTES + HEADER_BYTES


def check_agreement(
    call: Call, plan: Plan, description: Mapping[str, str | int | float], device: torch.device
) -> None:
    """Raise RankMismatchError on all ranks unless all gave the same description.

    description: at most 1 kB as JSON. device: where messages of this group must lie.
    """
    rank = call.transport.rank
    text = json.dumps(dict(description)).encode("ascii").ljust(_DESCRIPTION_BYTES)
    assert len(text) == _DESCRIPTION_BYTES, f"description of {len(text)} bytes is too long"
    parcel = call.parcel("agreement", (_DESCRIPTION_BYTES,), torch.uint8, device)
    parcel.payload.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    said = {rank: dict(description)}
    for step in plan.steps[rank][:-1]:
        payload = call.start(parcel, step.kv).wait()
        said[parcel.owner] = json.loads(bytes(payload.tolist()))
    differences = _differences([said[r] for r in range(plan.size)])
    if differences:
        raise RankMismatchError(
            f"ring call {call.number}: expected the same arguments on all {plan.size} ranks, got "
            + "; ".join(differences)
            + f" (this is rank {rank})"
        )


def _differences(said: list[dict[str, str | int | float]]) -> list[str]:
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
