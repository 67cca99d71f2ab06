"""Which strategy: a small rule from shapes and link figures.

Does: estimate the time of one forward and backward of a `StrategyPlan` on one chip per rank, and
choose the least. Does not: simulate kernels or topologies (`nxd_cp.simulators.cluster` does), or
measure. Every time here is an estimate from published peaks, good for comparing strategies and for
nothing else.

Note [The rule]
    A step costs the larger of its computation, 2 (D + Dv) FLOP per visible pair and query head
    (2.5 times that in the backward), and of the messages under way meanwhile: a latency, and bytes
    over the rate of a link. "ring" uses one link; "gather" and the all-to-all of "heads" send to
    several ranks at once and are given `fan_out` links. The first round of "gather", both exchanges
    of "heads" and the last gradients of all are not hidden by anything. A tie goes to the ring,
    which needs the least memory.

Letters: n ranks, u ranks that split heads, L tokens per rank, D and Dv head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from nxd_cp.schedule import GRADIENT_ITEMSIZE, Plan, Step, num_rows
from nxd_cp.strategies.plan import Strategy, StrategyPlan, plan_strategy


@dataclass(frozen=True)
class Figures:
    """What the rule knows of a chip and its links.

    tflops: dense 16-bit peak of a chip. efficiency: the part of it that attention reaches, assumed.
    gb_per_s: one link, one direction. fan_out: links that messages to many ranks use at once, over
    the links that each passes. latency_us: an empty message.
    """

    tflops: float
    efficiency: float
    gb_per_s: float
    fan_out: float
    latency_us: float
    source: str


MARGIN = 1.03

_TORUS = 4 / (32 / 15)  # four neighbours in a torus of 4 x 4, at a mean distance of 32 / 15 hops

FIGURES: dict[str, Figures] = {
    "trn1": Figures(
        190.0, 0.6, 48.0, _TORUS, 20.0, "trainium.rst; trn1-arch.rst: 384 GB/s over 4 links, 2 ways"
    ),
    "trn2": Figures(
        667.0, 0.6, 128.0, _TORUS, 20.0, "trainium2.rst; trn2-arch.rst: 128 GB/s per XY neighbour"
    ),
    "trn3": Figures(
        671.0, 0.6, 256.0, 1.0, 20.0, "trainium3.rst; trn3-arch.rst: 256 GB/s within a sled"
    ),
}


@dataclass(frozen=True)
class Shape:
    """One attention call of a rank. itemsize: bytes per element of q, k and v. v_head_dim: of the
    values where it differs.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    v_head_dim: int | None = None

    @property
    def v_dim(self) -> int:
        """Head dim of the values."""
        return self.v_head_dim or self.head_dim

    @property
    def row_bytes(self) -> int:
        """One row of K and V of one head, all sequences of the batch."""
        return self.batch * (self.head_dim + self.v_dim) * self.itemsize


def plan_for(plan: Plan, strategy: Strategy, shape: Shape) -> StrategyPlan:
    """A ring plan carried out by `strategy`, which may be "auto"."""
    return plan_strategy(
        plan,
        choose(plan, strategy, shape),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        row_bytes=shape.row_bytes,
    )


@dataclass(frozen=True)
class Cost:
    """The rule's figures for one strategy, of the busiest rank.

    seconds: estimated, forward and backward. hop_bytes: the largest message of keys and values, of
    gradients, and of heads (0 where there is none). sent_bytes: forward and backward together.
    buffer_bytes: message buffers and gathered or exchanged tensors at the worst moment.
    balance: the busiest rank's pairs over the mean, over the whole call.
    """

    work: StrategyPlan
    seconds: float
    hop_bytes: tuple[int, int, int]
    sent_bytes: int
    num_messages: int
    buffer_bytes: int
    balance: float


def estimate(work: StrategyPlan, shape: Shape, figures: Figures) -> Cost:
    """The cost of one strategy; see Note [The rule]."""
    plan, rounds = work.plan, len(work.rounds)
    traffic = [work.traffic(rank, **vars(shape)) for rank in range(plan.size)]
    totals = [one.forward_bytes + one.backward_bytes for one in traffic]
    busiest = max(range(plan.size), key=totals.__getitem__)
    pairs = [[step.num_pairs for step in steps] for steps in plan.steps]
    per_rank = [sum(one) for one in pairs]
    kv, heads = _message_bytes(work, shape)
    grad = kv * GRADIENT_ITEMSIZE // shape.itemsize
    return Cost(
        work=work,
        seconds=_seconds(work, shape, figures, [max(one) for one in zip(*pairs, strict=True)]),
        hop_bytes=(kv, grad, heads),
        sent_bytes=totals[busiest],
        num_messages=traffic[busiest].forward_messages + traffic[busiest].backward_messages,
        buffer_bytes=_buffer_bytes(work, shape, kv, grad, heads, rounds),
        balance=max(per_rank) * plan.size / sum(per_rank),
    )


def _message_bytes(work: StrategyPlan, shape: Shape) -> tuple[int, int]:
    """The largest message of keys and values; the largest all-to-all message. No headers."""
    plan = work.plan
    round_heads = max(heads.stop - heads.start for heads in work.rounds)
    q_row = shape.batch * (shape.head_dim + 2 * shape.v_dim) * shape.itemsize  # of q, o and do
    queries = plan.local_len * shape.num_heads * q_row
    keys = plan.local_kv_len * shape.num_kv_heads * shape.row_bytes
    exchanged = (queries + keys) // work.ways if work.ways > 1 else 0
    return plan.longest_hop * round_heads * shape.row_bytes, exchanged


def _buffer_bytes(
    work: StrategyPlan, shape: Shape, kv: int, grad: int, heads: int, rounds: int
) -> int:
    size, ways = work.plan.size, work.ways
    if work.strategy.name == "gather" and size > 1:
        return min(rounds, 2) * 2 * (size - 1) * kv + 2 * kv + 3 * grad
    exchanged = heads * (2 * (ways - 1) + ways) if ways > 1 else 0
    return exchanged + 2 * (kv + grad)


def _seconds(work: StrategyPlan, shape: Shape, figures: Figures, pairs: list[int]) -> float:
    """Forward plus backward of the busiest rank at each step."""
    rate = figures.tflops * figures.efficiency * 1e12
    link, latency = figures.gb_per_s * 1e9, figures.latency_us * 1e-6
    plan, ways, rounds = work.plan, work.ways, len(work.rounds)
    flop = 2.0 * shape.batch * (shape.num_heads / ways) * (shape.head_dim + shape.v_dim)
    kv, heads = _message_bytes(work, shape)
    grad = kv * GRADIENT_ITEMSIZE // shape.itemsize
    compute = [flop * count / rate / rounds for count in pairs]
    if work.strategy.name == "gather" and plan.size > 1:
        wide = link * figures.fan_out
        part = max(map(_rows_received, plan.steps)) / max(plan.longest_hop, 1)  # in messages
        gather, home = latency + part * kv / wide, latency + part * grad / wide
        one = sum(compute)
        forward = gather + (rounds - 1) * max(one, gather) + one
        backward = gather + (rounds - 1) * max(2.5 * one, gather + home) + 2.5 * one + home
        return forward + backward
    moves = [any(_rows_received(s[i : i + 1]) for s in plan.steps) for i in range(len(pairs))]
    hop, hop_back = latency + kv / link, 2 * latency + (kv + grad) / link
    forward = sum(max(c, hop * m) for c, m in zip(compute, moves, strict=True))
    backward = sum(max(2.5 * c, hop_back * m) for c, m in zip(compute, moves, strict=True))
    if plan.size > ways:
        backward += latency + grad / link
    exchange = 0.0
    if ways > 1:
        exchange = 4 * latency + 3 * (ways - 1) * heads / (link * figures.fan_out)
    return rounds * (forward + backward) + exchange


def _rows_received(steps: Iterable[Step]) -> int:
    """Rows of keys that come in during these steps."""
    return sum(num_rows(step.kv.into) for step in steps if step.kv is not None)


def candidates(plan: Plan, shape: Shape) -> list[StrategyPlan]:
    """Every strategy that these shapes allow: the ring, the gather, each number of ways."""
    most = math.gcd(plan.size, math.gcd(shape.num_heads, shape.num_kv_heads))
    wanted = [Strategy("ring")]
    if plan.size > 1:
        wanted.append(Strategy("gather"))
    wanted += [Strategy("heads", ways=u) for u in range(2, most + 1) if most % u == 0]
    return [plan_for(plan, one, shape) for one in wanted]


def compare(plan: Plan, shape: Shape, chip: str) -> list[Cost]:
    """Every candidate's cost, the chosen one first.

    Raises ValueError for a chip that is not in `FIGURES`.
    """
    if chip not in FIGURES:
        raise ValueError(f"chip: expected one of {', '.join(FIGURES)}, got {chip!r}")
    ring, *others = [estimate(work, shape, FIGURES[chip]) for work in candidates(plan, shape)]
    others.sort(key=lambda cost: cost.seconds)
    faster = [cost for cost in others if cost.seconds * MARGIN < ring.seconds]
    return [*faster, ring, *others[len(faster) :]]


@lru_cache(maxsize=64)
def _cheapest(plan: Plan, shape: Shape, chip: str) -> Strategy:
    return compare(plan, shape, chip)[0].work.strategy


def choose(plan: Plan, strategy: Strategy, shape: Shape) -> Strategy:
    """The strategy to use: the caller's own, or for "auto" the cheapest by the rule."""
    if strategy.name != "auto":
        return strategy
    if plan.size == 1:
        return replace(strategy, name="ring")
    return _cheapest(plan, shape, strategy.chip)
