"""How a ring plan is carried out: the strategies, as data.

Does: turn a ring `Plan` and a `Strategy` into a `StrategyPlan` of the same integers and slices.
Does not: touch tensors, work out other routes (`routes.py`), choose between strategies (`cost.py`),
or send (`heads.py`, `gather.py`). Standard library only.

Letters: n ranks, u ranks that split heads among them, L tokens per rank.

Note [Three strategies, one form]
    "ring"    Keys and values go round; this is the ring plan itself. It runs in rounds of heads.
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

Note [Rounds of heads]
    The ring runs once for as few key/value heads as make a round large: `LEAST_ROUND_BYTES` in its
    largest message, each head counted once for every query head that reads it. Such a round costs
    its bytes and its computing, and hardly the latency of messages and of ranks that wait for each
    other; and buffers, and blocks of results, are those of one round. Small problems are one round.
    A round has an even number of heads where two cores of a launch could share them only so.
    All this follows from the plan and the shapes, so it is the same on all ranks.

Source: all-to-all over heads: DeepSpeed Ulysses (arXiv 2309.14509); with a ring in a mesh: USP
(arXiv 2405.07719); gather by groups of heads: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from nxd_cp.schedule import HEADER_BYTES, Plan, Traffic
from nxd_cp.strategies.routes import HeadGroup, gather_plan, mesh_plan

StrategyName = Literal["ring", "gather", "heads", "auto"]
STRATEGIES: tuple[str, ...] = get_args(StrategyName)
LSE_ITEMSIZE = 4
LEAST_ROUND_BYTES = 2**23  # see Note [Rounds of heads]


@dataclass(frozen=True)
class Strategy:
    """What a caller asks for.

    name: "ring", "gather", "heads", or "auto" (by cost; see `nxd_cp.strategies.cost`).
    ways: "heads" only: the number of ranks that split heads; it divides ranks, query heads and
    key/value heads. None is the largest that does; where that is 1, two ranks or more are
    refused.
    heads_per_round: "ring" and "gather" only: key/value heads that travel together; None is one
    for the gather, and for the ring what Note [Rounds of heads] says. Fewer heads make smaller
    buffers and more messages.
    chip: "auto" only: whose figures the cost rule reads, a name in `cost.FIGURES`.
    """

    name: str = "ring"
    ways: int | None = None
    heads_per_round: int | None = None
    chip: str = "trn2"

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.name}")
        if not isinstance(self.chip, str):
            raise ValueError(f"chip: expected a name, got {self.chip!r}")
        for name, number in (("heads_per_round", self.heads_per_round), ("ways", self.ways)):
            if number is not None and type(number) is not int:
                raise ValueError(f"{name}: expected a whole number or None, got {number!r}")
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
        if self.name == "auto":
            return f"auto for {self.chip}"
        if self.heads_per_round is not None:
            return f"{self.name} by {self.heads_per_round}"
        return self.name if self.ways is None else f"{self.name} x{self.ways}"


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
        v_head_dim: int | None = None,
    ) -> Traffic:
        """What `rank` sends in one forward and one backward, exactly; the agreement is not counted.

        itemsize: bytes per element of q, k and v. v_head_dim: of v and o where it differs.
        """
        ring = self.plan.traffic(
            rank,
            batch=batch,
            num_kv_heads=num_kv_heads // self.ways,
            head_dim=head_dim,
            itemsize=itemsize,
            v_head_dim=v_head_dim,
        )
        rounds, others = len(self.rounds), self.ways - 1
        v_dim = v_head_dim or head_dim
        rows = batch * self.plan.local_len * (num_heads // self.ways)
        kv_rows = batch * self.plan.local_kv_len * (num_kv_heads // self.ways)
        q_bytes, o_bytes = rows * head_dim * itemsize, rows * v_dim * itemsize
        kv_bytes = kv_rows * (head_dim + v_dim) * itemsize
        lse_bytes = rows * LSE_ITEMSIZE
        forward = q_bytes + kv_bytes + o_bytes + lse_bytes + 2 * HEADER_BYTES
        backward = 2 * (q_bytes + o_bytes + kv_bytes) + lse_bytes + 2 * HEADER_BYTES
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


@lru_cache(maxsize=256)
def plan_strategy(
    plan: Plan, strategy: Strategy, *, num_heads: int, num_kv_heads: int, row_bytes: int = 0
) -> StrategyPlan:
    """Carry out `plan`, a ring plan, by `strategy` (not "auto").

    row_bytes: one row of K and V of one head, all sequences of the batch: from it and the longest
    message of the plan follow the rounds of a ring that has none given; 0 is one round.
    Raises ValueError when `ways` does not divide ranks and heads.
    """
    if strategy.name == "heads":
        ways = head_ways(strategy.ways, plan.size, num_heads, num_kv_heads)
        strategy = dataclasses.replace(strategy, ways=ways)
        if ways > 1:
            mesh, groups = mesh_plan(plan, ways)
            return StrategyPlan(strategy, mesh, (slice(0, num_kv_heads // ways),), groups)
    if strategy.name == "gather" and plan.size > 1:
        rounds = _rounds(num_kv_heads, strategy.heads_per_round or 1)
        return StrategyPlan(strategy, gather_plan(plan), rounds)
    assert strategy.name != "auto", "the cost rule comes first"
    together = strategy.heads_per_round if strategy.name == "ring" and plan.size > 1 else None
    if together is None:
        least = _heads_of_a_round(plan.longest_hop * row_bytes, num_heads, num_kv_heads)
        together = least if least < num_kv_heads else None
    rounds = _rounds(num_kv_heads, together or num_kv_heads)
    return StrategyPlan(Strategy("ring", heads_per_round=together), plan, rounds)


def _heads_of_a_round(head_bytes: int, num_heads: int, num_kv_heads: int) -> int:
    """See Note [Rounds of heads]. head_bytes: of the largest message, per key/value head."""
    group = num_heads // num_kv_heads
    least = -(-LEAST_ROUND_BYTES // max(head_bytes * group, 1))
    shared_by_two = num_kv_heads % 2 == 0 and group % 2 == 1
    return least + least % 2 if shared_by_two else least


def _rounds(num_kv_heads: int, together: int) -> tuple[slice, ...]:
    starts = range(0, num_kv_heads, together)
    return tuple(slice(start, min(start + together, num_kv_heads)) for start in starts)


def head_ways(asked: int | None, size: int, num_heads: int, num_kv_heads: int) -> int:
    """The number of ranks that split heads: what was asked for, or the most that divides."""
    most = math.gcd(size, math.gcd(num_heads, num_kv_heads))
    if asked is None and most == 1 and size > 1:
        raise ValueError(
            f'strategy "heads": expected {size} ranks that share a divisor with {num_heads} query '
            f'heads and {num_kv_heads} key/value heads, got none but 1; use strategy "ring"'
        )
    if asked is None:
        return most
    if most % asked:
        raise ValueError(
            f'strategy "heads": expected ways that divide {size} ranks, {num_heads} query heads '
            f"and {num_kv_heads} key/value heads, got {asked}; use a divisor of {most}"
        )
    return asked
