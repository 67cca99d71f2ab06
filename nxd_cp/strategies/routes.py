"""Other routes for the tiles of a ring plan: straight from their owner, and within a mesh.

Does: give the steps of a ring other ends in each `Move`; say who exchanges heads with whom. Does
not: choose a route (`plan.py`), or send (`gather.py`, `heads.py`). Standard library only.

Letters: n ranks, u ranks that split heads among them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from nxd_cp.schedule import Move, Plan, Rows, Step, Tile, make_plan, one_move, token_runs, union

Pieces = tuple[tuple[slice, slice], ...]


@dataclass(frozen=True)
class HeadGroup:
    """A rank's group in the "heads" strategy: who is in it, and where their tokens go.

    members: group ranks; member i computes the i-th part of the heads. index: our place.
    rows, key_rows: for each member, pairs (its local rows, rows of the joined sequence), of queries
    and of keys.
    """

    members: tuple[int, ...]
    index: int
    rows: tuple[Pieces, ...]
    key_rows: tuple[Pieces, ...]

    @property
    def ways(self) -> int:
        """Number of members."""
        return len(self.members)


def gather_plan(plan: Plan) -> Plan:
    """The same tiles, with keys straight from their owner and gradients straight back to it; of a
    block only the rows that the receiver sees.
    """
    order = plan.ring_order
    place = {rank: index for index, rank in enumerate(order)}
    tiles: list[dict[int, tuple[Tile, ...]]] = [
        {step.owner: step.tiles for step in steps} for steps in plan.steps
    ]

    def at(rank: int, distance: int) -> int:
        return order[(place[rank] + distance) % plan.size]

    def seen(user: int, owner: int) -> Rows:
        return union(tile.k for tile in tiles[user].get(owner, ()))

    def step(rank: int, index: int) -> Step:
        owner, following = at(rank, -index), at(rank, -index - 1)
        ahead, next_ahead = at(rank, index), at(rank, index + 1)
        kv = grad = None
        if index < plan.size - 1:
            out, into = seen(next_ahead, rank), seen(rank, following)
            kv = one_move(next_ahead, following, brings=following, out=out, into=into)
        if index:
            out, into = seen(rank, owner), seen(ahead, rank)
            grad = one_move(owner, ahead, brings=rank, out=out, into=into)
        return Step(index, owner, tiles[rank].get(owner, ()), kv, grad)

    steps = tuple(tuple(step(rank, i) for i in range(plan.size)) for rank in range(plan.size))
    return dataclasses.replace(plan, steps=steps, gradient_route="direct")


def mesh_plan(plan: Plan, ways: int) -> tuple[Plan, tuple[HeadGroup, ...]]:
    """The ring of n / ways ranks in each column of the mesh, and each rank's group, its row."""
    groups = head_groups(plan.layout, plan.size, ways, plan.seq_len, plan.kv_len)
    number = {rank: index for index, group in enumerate(groups) for rank in group.members}
    order = tuple(dict.fromkeys(number[rank] for rank in plan.ring_order))
    inner = make_plan(
        plan.layout,
        plan.size // ways,
        plan.seq_len,
        causal=plan.causal,
        window=(plan.left, plan.right),
        ring_order=order,
        kv_len=plan.kv_len,
        num_tokens=plan.num_tokens,
        num_kv_tokens=plan.num_kv_tokens,
    )
    by_rank = []
    steps: list[tuple[Step, ...]] = []
    for rank in range(plan.size):
        group = groups[number[rank]]
        index = group.members.index(rank)
        column = [other.members[index] for other in groups]
        by_rank.append(dataclasses.replace(group, index=index))
        steps.append(tuple(_renamed(step, column) for step in inner.steps[number[rank]]))
    translated = dataclasses.replace(
        inner,
        size=plan.size,
        ring_order=plan.ring_order,
        steps=tuple(steps),
        local_tokens=tuple(inner.local_tokens[number[rank]] for rank in range(plan.size)),
    )
    return translated, tuple(by_rank)


@lru_cache(maxsize=64)
def head_groups(
    layout: str, size: int, ways: int, seq_len: int, kv_len: int
) -> tuple[HeadGroup, ...]:
    """Groups of `ways` ranks; group g holds the tokens of rank g of a ring of size / ways."""
    both = (_members(layout, size, ways, length) for length in (seq_len, kv_len))
    groups = []
    for (members, rows), (same, key_rows) in zip(*both, strict=True):
        assert members == same, f"{layout}: queries of {members} and keys of {same}"
        groups.append(HeadGroup(members, 0, rows, key_rows))
    return tuple(groups)


def _members(
    layout: str, size: int, ways: int, seq_len: int
) -> list[tuple[tuple[int, ...], tuple[Pieces, ...]]]:
    """Of each group its members, and where their tokens of a sequence go."""
    runs = [token_runs(layout, size, rank, seq_len) for rank in range(size)]
    found = []
    for number in range(size // ways):
        joined = token_runs(layout, size // ways, number, seq_len)
        members = tuple(rank for rank in range(size) if _within(runs[rank], joined))
        assert len(members) == ways, f"{layout}: expected {ways} members, got {members}"
        found.append((members, tuple(_rows(runs[rank], joined) for rank in members)))
    return found


def _within(runs: tuple[range, ...], joined: tuple[range, ...]) -> bool:
    return all(any(run[0] in one and run[-1] in one for one in joined) for run in runs)


def _rows(runs: tuple[range, ...], joined: tuple[range, ...]) -> Pieces:
    """Where the tokens of `runs` lie in the concatenation of `joined`."""
    found, local = [], 0
    for run in runs:
        before = 0
        for one in joined:
            if run[0] in one:
                start, stride = before + one.index(run[0]), run.step // one.step
                there = slice(start, start + (len(run) - 1) * stride + 1, stride)
                found.append((slice(local, local + len(run)), there))
                break
            before += len(one)
        local += len(run)
    return tuple(found)


def _renamed(step: Step, names: list[int]) -> Step:
    """A step of the inner ring with the group ranks of one column."""

    def rename(move: Move | None) -> Move | None:
        if move is None:
            return None
        to = None if move.to is None else names[move.to]
        source = None if move.source is None else names[move.source]
        return dataclasses.replace(move, to=to, source=source, brings=names[move.brings])

    return dataclasses.replace(
        step, owner=names[step.owner], kv=rename(step.kv), grad=rename(step.grad)
    )
