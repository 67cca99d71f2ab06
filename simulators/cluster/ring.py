"""A ring of positions: executes a schedule with kernel times and links, both at once.

Does: walk the plan of nxd_cp.schedule step by step for all ranks at once, as the executor does (the
exchange of a step starts with the step, on both sides, and is waited for after it). Gives the step
time, exposed communication, balance and efficiency. Does not: know how a kernel or a link works.

Letters: n ring size, r rank, i step. Arrays are indexed by rank.
Source: nxd_cp.ring, which this mirrors; Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from nxd_cp.schedule import GRADIENT_ITEMSIZE, HEADER_BYTES, Plan
from nxd_cp.simulators.timing.constants import constants_for

from .kernel_time import KernelTime
from .links import LAUNCH, LINKS
from .topology import Cluster

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What travels: heads and dtype of the whole position. itemsize: bytes of keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1
    itemsize: int = 2

    def kv_bytes(self, tokens: int) -> float:
        """Keys and values of `tokens`, one message."""
        elements = 2 * self.batch * self.num_kv_heads * tokens * self.head_dim
        return elements * self.itemsize + HEADER_BYTES

    def grad_bytes(self, tokens: int) -> float:
        """Gradients of keys and values of `tokens`, one message."""
        elements = 2 * self.batch * self.num_kv_heads * tokens * self.head_dim
        return elements * GRADIENT_ITEMSIZE + HEADER_BYTES


@dataclass(frozen=True)
class RingTimes:
    """One pass (forward or backward) of a ring, ns. Arrays are [steps, ranks].

    start, end: computing of each step. arrival: its keys and values are there. exposed_ns: time
    that the slowest rank waits for messages; compute_ns: its computing. alone_ns: one position,
    all tokens, no messages. guess_share: share of the total that rests on guesses: the launch of
    a hop, some links, a kernel rate that was given.
    """

    total_ns: float
    exposed_ns: float
    compute_ns: float
    alone_ns: float
    balance: float
    hop_ns: tuple[float, ...]
    guess_share: float
    start: Any
    end: Any
    arrival: Any

    @property
    def efficiency(self) -> float:
        """Speed-up over one position, over the number of positions."""
        return self.alone_ns / (self.total_ns * self.start.shape[1])


def hop_times(
    cluster: Cluster, size_bytes: float, *, channels: int, level: str
) -> tuple[float, ...]:
    """ns of the hop from each position to the next.

    The chips of a position send side by side, each its part, over links of their own: neighbouring
    positions are taken to be linked chip by chip.
    """
    links = LINKS[cluster.generation]
    launch = LAUNCH.at(level)
    per_chip = size_bytes / max(1.0, cluster.chips)
    return tuple(
        launch + links[name].hop_ns(per_chip, channels=channels, level=level)
        for name in cluster.hop_links()
    )


def simulate(
    plan: Plan,
    cluster: Cluster,
    model: Model,
    kernel: KernelTime,
    *,
    backward: bool = False,
    channels: int = 1,
    level: str = "expected",
    launch_ns: float = 0.0,
    progress: Progress | None = None,
) -> RingTimes:
    """Times of one pass of `plan` on `cluster`.

    kernel: times of rectangles for all heads of a position, forward or backward as asked.
    launch_ns: added to every rectangle. progress: called with (steps done, steps).
    Raises ValueError when the plan and the cluster differ in size, or channels is not 1, 2 or 4.
    """
    if plan.size != cluster.num_positions:
        raise ValueError(
            f"plan: expected {cluster.num_positions} ranks as in the cluster, got {plan.size}"
        )
    if plan.window is not None:
        raise ValueError(f"plan: expected one without a window, got window={plan.window}")
    if channels not in (1, 2, 4):
        raise ValueError(f"channels: expected 1, 2 or 4, got {channels}")
    compute = _compute_times(plan, kernel, launch_ns)
    tokens = plan.local_len
    kv = np.array(hop_times(cluster, model.kv_bytes(tokens), channels=channels, level=level))
    grad = np.array(hop_times(cluster, model.grad_bytes(tokens), channels=channels, level=level))
    ring = _Ring(plan, kernel.dma_share, _message_share(cluster, model.kv_bytes(tokens), kv, level))
    times = ring.walk(compute, kv, grad if backward else None, progress)
    start, end, arrival, finish = times
    slowest = int(np.argmax(finish))
    alone = kernel.rectangle_ns(plan.seq_len, plan.seq_len, "causal" if plan.causal else "full")
    work = compute.sum(axis=0)
    total = float(finish.max())
    exposed = total - float(work[slowest])
    guesses = kernel.guess_share * float(work[slowest])
    guesses += _guessed_hop_share(cluster, kv, level) * exposed
    return RingTimes(
        total_ns=total,
        exposed_ns=exposed,
        compute_ns=float(work[slowest]),
        alone_ns=alone + launch_ns,
        balance=float(work.max() / work.mean()) if work.mean() else 1.0,
        hop_ns=tuple(float(x) for x in kv),
        guess_share=guesses / total if total else 0.0,
        start=start,
        end=end,
        arrival=arrival,
    )


def _compute_times(plan: Plan, kernel: KernelTime, launch_ns: float) -> Any:
    """[steps, ranks] ns of computing."""

    @cache
    def rectangle(q_len: int, k_len: int, mask: str) -> float:
        return launch_ns + kernel.rectangle_ns(q_len, k_len, mask)

    return np.array(
        [
            [
                sum(rectangle(t.q_len, t.k_len, t.mask) for t in steps[i].tiles)
                for steps in plan.steps
            ]
            for i in range(plan.size)
        ]
    )


class _Ring:
    """The walk. Position p of the ring order holds rank order[p]."""

    def __init__(self, plan: Plan, kernel_share: float, message_share: Any) -> None:
        order = np.array(plan.ring_order)
        self.place = np.argsort(order)  # place of each rank on the ring
        self.left = order[(self.place - 1) % plan.size]
        over = np.maximum(0.0, kernel_share + message_share - 1.0)
        self.stretch = over[self.place - 1] if plan.size > 1 else 0.0

    def walk(self, compute: Any, kv: Any, grad: Any, progress: Progress | None) -> Any:
        """(start, end, arrival, finish) of all steps; finish includes gradients coming home."""
        steps, n = compute.shape
        start, end, arrival = (np.zeros((steps, n)) for _ in range(3))
        incoming = kv[self.place - 1] if n > 1 else np.zeros(n)
        grad_incoming = grad[self.place - 1] if grad is not None and n > 1 else None
        here = np.zeros(n)  # keys and values of the step are here
        free = np.zeros(n)  # the rank has finished the step before
        grads = np.zeros(n)  # gradients of the visitor are here
        for i in range(steps):
            arrival[i] = here
            start[i] = np.maximum(here, free)
            overlap = incoming if i < steps - 1 else np.zeros(n)
            work = self._slowed(compute[i], overlap)
            end[i] = start[i] + work
            here = np.maximum(start[i], start[i][self.left]) + overlap
            free = end[i]
            if grad_incoming is not None:
                ready = np.maximum(end[i], grads)  # added to the visitor's, then sent on
                grads = np.maximum(ready, ready[self.left]) + grad_incoming
                free = ready
            if progress is not None:
                progress(i + 1, steps)
        finish = end[-1] if grad_incoming is None else np.maximum(end[-1], grads)
        return start, end, arrival, finish

    def _slowed(self, compute: Any, transfer: Any) -> Any:
        """Computing, stretched while kernel and messages want more than all DMA engines."""
        return compute + np.minimum(compute, transfer) * self.stretch


def _message_share(cluster: Cluster, size_bytes: float, hop_ns: Any, level: str) -> Any:
    """Share of a position's DMA engines that one message takes: received, sent on, and loaded."""
    rate = constants_for(cluster.generation).at(level).dma_core_rate * cluster.cores
    return 3.0 * size_bytes / (hop_ns * rate)


def _guessed_hop_share(cluster: Cluster, hop_ns: Any, level: str) -> float:
    """Share of the slowest hop that rests on guesses: all of it over a link whose rate is one."""
    links = cluster.hop_links()
    if not links:
        return 0.0
    slowest = int(np.argmax(hop_ns))
    if LINKS[cluster.generation][links[slowest]].rate.tag == "guess":
        return 1.0
    return LAUNCH.at(level) / float(hop_ns[slowest])


def closed_form_exposed_ns(compute_ns: float, hop_ns: float, num_hops: int) -> float:
    """Communication that equal steps cannot hide: per hop, what it takes beyond the computing."""
    return num_hops * max(0.0, hop_ns - compute_ns)
