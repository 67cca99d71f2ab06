"""Replica groups: which ranks talk to each other, and in which order a ring goes round.

A rank's number within its group is its position in the list. The runtime chooses the order of an
implicit ring; here it is the list's order, or a shuffled one (SimParams.adversarial).

Source: nki.collectives.ReplicaGroup.
"""

from __future__ import annotations

import random
from operator import index
from typing import Any

from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.nki_object import NKIObject
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run

_GROUP = documented(
    "collective.group",
    "nki.collectives.ReplicaGroup",
    "groups are lists of the ranks that run, without overlap, and the caller is in one of them",
)


class ReplicaGroup(NKIObject):
    """Groups of ranks that take part in a collective: ReplicaGroup([[0, 1], [2, 3]])."""

    def __init__(self, groups: Any) -> None:
        try:
            self.groups = tuple(tuple(index(rank) for rank in ranks) for ranks in groups)
        except TypeError:
            raise ValueError(
                f"expected lists of ranks, as in ReplicaGroup([[0, 1]]), got {groups!r}"
            ) from None

    def __repr__(self) -> str:
        return f"ReplicaGroup({[list(ranks) for ranks in self.groups]})"


def own_group(run: Run, instr: str, replica_group: Any) -> tuple[int, ...]:
    """The ranks of the caller's group, in order."""
    if not isinstance(replica_group, ReplicaGroup):
        fail(_GROUP, instr, f"replica_group={replica_group!r} is no ReplicaGroup")
    ranks = [rank for group in replica_group.groups for rank in group]
    num_ranks = run.world.num_ranks
    if len(set(ranks)) != len(ranks) or any(not 0 <= rank < num_ranks for rank in ranks):
        hint = "; run it with simulate_ranks" if num_ranks == 1 else ""
        fail(_GROUP, instr, f"{replica_group} with {num_ranks} rank(s) running{hint}")
    own = next((g for g in replica_group.groups if run.place.rank in g), None)
    if own is None:
        fail(_GROUP, instr, f"rank {run.place.rank} is in no group of {replica_group}")
    return own


def ring(run: Run, group: tuple[int, ...], channel: int) -> tuple[int, ...]:
    """The ranks of a group in the order in which data go round on a channel."""
    if run.world.seed is None:
        return group
    order = list(group)
    random.Random(f"{run.world.seed} {group} {channel}").shuffle(order)
    return tuple(order)
