"""How a ring plan is carried out: the strategies, as data.

Does: turn a ring `Plan` and a `Strategy` into a `StrategyPlan` of the same integers and slices.
Does not: touch tensors, choose between strategies (`cost.py`), or send (`heads.py`, `gather.py`).
Standard library only.

Letters: n ranks, u ranks that split heads among them, L tokens per rank.

Note [Three strategies, one form]
    "ring"    Keys and values go round; this is the ring plan itself. It may run in rounds of heads.
    "gather"  Keys and values go from their owner straight to every rank that sees some of them, one
              round of key/value heads at a time; the messages of a round are under way while the
              round before is computed. Partial gradients go straight back. The same steps and tiles
              as the ring, with other ends in each `Move`.
    "heads"   The ranks form a mesh, u x (n / u). The u ranks of a group together hold the tokens of
              one rank of a ring of n / u; an all-to-all gives each of them these tokens for Hq / u
              heads, and n / u ranks with the same heads form a ring. With u = n no ring is left.
    Every strategy is a `Plan` whose steps name group ranks, so one executor runs them all. Moving
    queries instead of keys, or rings of two levels, would be other steps and moves in this form;
    they are not built.
Source: all-to-all over heads: DeepSpeed Ulysses (arXiv 2309.14509); with a ring in a mesh: USP
(arXiv 2405.07719); gather by groups of heads: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from nxd_cp.schedule import (
    HEADER_BYTES,
    Move,
    Plan,
    Rows,
    Step,
    Tile,
    Traffic,
    make_plan,
    token_runs,
)

StrategyName = Literal["ring", "gather", "heads", "auto"]
STRATEGIES: tuple[str, ...] = get_args(StrategyName)
LSE_ITEMSIZE = 4


@dataclass(frozen=True)
class Strategy:
    """What a caller asks for.

    name: "ring", "gather", "heads", or "auto" (by cost; see `nxd_cp.strategies.cost`).
    ways: "heads" only: the number of ranks that split heads; it divides ranks, query heads and
    key/value heads. None is the largest that does.
    heads_per_round: "ring" and "gather" only: key/value heads that travel together; None is all
    for the ring and one for the gather. Fewer heads make smaller buffers and more messages.
    chip: "auto" only: whose figures the cost rule reads, a name in `cost.FIGURES`.
    """

    name: str = "ring"
    ways: int | None = None
    heads_per_round: int | None = None
    chip: str = "trn2"

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.name}")
        has_rounds = self.name in ("ring", "gather")
        if self.heads_per_round is not None and (self.heads_per_round < 1 or not has_rounds):
            raise ValueError(
                'heads_per_round: expected at least 1 with strategy "ring" or "gather" and None '
                f'with others, got {self.heads_per_round} with "{self.name}"'
            )
        if self.ways is not None and (self.name != "heads" or self.ways < 1):
            raise ValueError(
                f'ways: expected at least 1 with strategy "heads" and None with others, got '
                f'{self.ways} with "{self.name}"'
            )

    def __str__(self) -> str:
        if self.heads_per_round is not None:
            return f"{self.name} by {self.heads_per_round}"
        return self.name if self.ways is None else f"{self.name} x{self.ways}"


@dataclass(frozen=True)
class HeadGroup:
    """A rank's group in the "heads" strategy: who is in it, and where their tokens go.

    members: group ranks; member i computes the i-th part of the heads. index: our place.
    rows: for each member, pairs (its local rows, rows of the joined sequence).
    """

    members: tuple[int, ...]
    index: int
    rows: tuple[tuple[tuple[slice, slice], ...], ...]

    @property
    def ways(self) -> int:
        """Number of members."""
        return len(self.members)


@dataclass(frozen=True)
class StrategyPlan:
    """A strategy made out in full.

    strategy: never "auto". plan: steps of every rank; all moves name group ranks. rounds: slices of
    key/value heads, run one after the other. groups: by rank, "heads" only.
    """

    strategy: Strategy
    plan: Plan
    rounds: tuple[slice, ...]
    groups: tuple[HeadGroup, ...] | None = None

    @property
    def ways(self) -> int:
        """Number of ranks that split heads; 1 for other strategies."""
        return 1 if self.groups is None else self.groups[0].ways

    def traffic(
        self,
        rank: int,
        *,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
    ) -> Traffic:
        """What `rank` sends in one forward and one backward, exactly; the agreement is not counted.

        itemsize: bytes per element of q, k and v.
        """
        ring = self.plan.traffic(
            rank,
            batch=batch,
            num_kv_heads=num_kv_heads // self.ways,
            head_dim=head_dim,
            itemsize=itemsize,
        )
        rounds, others = len(self.rounds), self.ways - 1
        rows = batch * (self.plan.seq_len // self.plan.size)
        q_bytes = rows * (num_heads // self.ways) * head_dim * itemsize
        kv_bytes = 2 * rows * (num_kv_heads // self.ways) * head_dim * itemsize
        lse_bytes = rows * (num_heads // self.ways) * LSE_ITEMSIZE
        forward = 2 * q_bytes + kv_bytes + lse_bytes + 2 * HEADER_BYTES
        backward = 4 * q_bytes + 2 * kv_bytes + lse_bytes + 2 * HEADER_BYTES
        more_headers = (rounds - 1) * HEADER_BYTES
        return Traffic(
            forward_messages=rounds * ring.forward_messages + 2 * others,
            forward_bytes=ring.forward_bytes
            + more_headers * ring.forward_messages
            + others * forward,
            backward_messages=rounds * ring.backward_messages + 2 * others,
            backward_bytes=ring.backward_bytes
            + more_headers * ring.backward_messages
            + others * backward,
        )


def plan_strategy(
    plan: Plan, strategy: Strategy, *, num_heads: int, num_kv_heads: int
) -> StrategyPlan:
    """Carry out `plan`, a ring plan, by `strategy` (not "auto").

    Raises ValueError when `ways` does not divide ranks and heads.
    """
    if strategy.name == "heads":
        ways = head_ways(strategy.ways, plan.size, num_heads, num_kv_heads)
        strategy = dataclasses.replace(strategy, ways=ways)
        if ways > 1 and plan.kv_len != plan.seq_len:
            raise ValueError(
                f'strategy "heads": expected as many keys as queries, got {plan.kv_len} and '
                f'{plan.seq_len}; use strategy="ring"'
            )
        if ways > 1:
            return StrategyPlan(strategy, *_head_plan(plan, ways, num_kv_heads))
    if strategy.name == "gather" and plan.size > 1:
        rounds = _rounds(num_kv_heads, strategy.heads_per_round or 1)
        return StrategyPlan(strategy, gather_plan(plan), rounds)
    assert strategy.name != "auto", "the cost rule comes first"
    together = strategy.heads_per_round if strategy.name == "ring" and plan.size > 1 else None
    rounds = _rounds(num_kv_heads, together or num_kv_heads)
    return StrategyPlan(Strategy("ring", heads_per_round=together), plan, rounds)


def _rounds(num_kv_heads: int, together: int) -> tuple[slice, ...]:
    starts = range(0, num_kv_heads, together)
    return tuple(slice(start, min(start + together, num_kv_heads)) for start in starts)


def head_ways(asked: int | None, size: int, num_heads: int, num_kv_heads: int) -> int:
    """The number of ranks that split heads: what was asked for, or the most that divides."""
    most = math.gcd(size, math.gcd(num_heads, num_kv_heads))
    if asked is None:
        return most
    if most % asked:
        raise ValueError(
            f'strategy "heads": expected ways that divide {size} ranks, {num_heads} query heads '
            f"and {num_kv_heads} key/value heads, got {asked}; use a divisor of {most}"
        )
    return asked


def gather_plan(plan: Plan) -> Plan:
    """The same tiles, with keys straight from their owner and gradients straight back to it."""
    order, whole = plan.ring_order, (slice(0, plan.local_kv_len),)
    place = {rank: index for index, rank in enumerate(order)}
    tiles: list[dict[int, tuple[Tile, ...]]] = [
        {step.owner: step.tiles for step in steps} for steps in plan.steps
    ]

    def at(rank: int, distance: int) -> int:
        return order[(place[rank] + distance) % plan.size]

    def exchange(user: int, owner: int, mine: int) -> tuple[int | None, int | None]:
        """(to, source) when `mine` goes to `user`, and the keys of `owner` come here."""
        to = user if tiles[user].get(mine) else None
        return to, owner if tiles[mine].get(owner) else None

    def step(rank: int, index: int) -> Step:
        owner, following = at(rank, -index), at(rank, -index - 1)
        kv = grad = None
        if index < plan.size - 1:
            to, source = exchange(at(rank, index + 1), following, rank)
            kv = _move(to, source, brings=following, whole=whole)
        if index:
            source, to = exchange(at(rank, index), owner, rank)
            grad = _move(to, source, brings=rank, whole=whole)
        return Step(index, owner, tiles[rank].get(owner, ()), kv, grad)

    steps = tuple(tuple(step(rank, i) for i in range(plan.size)) for rank in range(plan.size))
    return dataclasses.replace(plan, steps=steps, gradient_route="direct")


def _move(to: int | None, source: int | None, *, brings: int, whole: Rows) -> Move | None:
    if to is source is None:
        return None
    return Move(
        to, source, brings, whole if to is not None else (), whole if source is not None else ()
    )


def _head_plan(
    plan: Plan, ways: int, num_kv_heads: int
) -> tuple[Plan, tuple[slice, ...], tuple[HeadGroup, ...]]:
    """The ring of n / ways ranks in each column of the mesh, and the groups that are its rows."""
    groups = head_groups(plan.layout, plan.size, ways, plan.seq_len)
    number = {rank: index for index, group in enumerate(groups) for rank in group.members}
    order = tuple(dict.fromkeys(number[rank] for rank in plan.ring_order))
    inner = make_plan(
        plan.layout,
        plan.size // ways,
        plan.seq_len,
        causal=plan.causal,
        window=(plan.left, plan.right),
        ring_order=order,
        num_tokens=plan.num_tokens,
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
    return translated, (slice(0, num_kv_heads // ways),), tuple(by_rank)


@lru_cache(maxsize=64)
def head_groups(layout: str, size: int, ways: int, seq_len: int) -> tuple[HeadGroup, ...]:
    """Groups of `ways` ranks; group g holds the tokens of rank g of a ring of size / ways."""
    runs = [token_runs(layout, size, rank, seq_len) for rank in range(size)]
    groups = []
    for number in range(size // ways):
        joined = token_runs(layout, size // ways, number, seq_len)
        members = tuple(rank for rank in range(size) if _within(runs[rank], joined))
        assert len(members) == ways, f"{layout}: expected {ways} members, got {members}"
        groups.append(HeadGroup(members, 0, tuple(_rows(runs[rank], joined) for rank in members)))
    return tuple(groups)


def _within(runs: tuple[range, ...], joined: tuple[range, ...]) -> bool:
    return all(any(run[0] in one and run[-1] in one for one in joined) for run in runs)


def _rows(runs: tuple[range, ...], joined: tuple[range, ...]) -> tuple[tuple[slice, slice], ...]:
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
