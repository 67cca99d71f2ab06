"""How long one position computes a rectangle of scores: by rate, or by timed kernels extrapolated.

Does: give `rectangle_ns(q_len, k_len, mask)` for one position's heads. Two ways: Rate (flops per
second) and Timed (runs the real kernel in the simulator at two sizes per direction, in the steady
state, and goes on linearly). Does not: know the ring.

Letters: H query heads, G key/value heads, D head dim, of one core.
Note [Linear in tiles]
    A block kernel does the same work for every 128 x 512 tile and the same extra work for every 128
    query rows and every 512 keys: time = a + b q + c k + d q k for a full rectangle, and
    a + b q + d q (q + 1) / 2 in 128-row blocks under a diagonal. Two sizes per direction give the
    coefficients; tests run a third in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

ROWS = 128  # kernels take multiples of this many queries and keys


class KernelTime(Protocol):
    """ns for one rectangle on one position, and its share of the DMA engines while it runs."""

    @property
    def dma_share(self) -> float:
        """Share of the position's DMA engines that the kernel keeps busy."""
        ...

    @property
    def guess_share(self) -> float:
        """Share of its times that rests on guesses; 1 for a rate that somebody assumed."""
        ...

    def rectangle_ns(self, q_len: int, k_len: int, mask: str) -> float:
        """ns of the forward (or backward) of one rectangle, all heads of the position."""
        ...


@dataclass(frozen=True)
class Rate:
    """A sustained rate, in flops per ns of one position: 535e12 flop/s is 535_000.

    flops_per_pair: 4 D H for the forward, 10 D H for the backward (H heads of the position).
    overhead_ns: per rectangle.
    """

    flops_per_ns: float
    flops_per_pair: float
    overhead_ns: float = 0.0
    dma_share: float = 0.0
    guess_share: float = 1.0

    def rectangle_ns(self, q_len: int, k_len: int, mask: str) -> float:
        """ns at the given rate, counting visible pairs exactly."""
        pairs = q_len * k_len if mask == "full" else q_len * (q_len + (1, -1)[mask == "strict"]) / 2
        return self.overhead_ns + pairs * self.flops_per_pair / self.flops_per_ns


@dataclass
class Timed:
    """Extrapolates `measure(q_len, k_len, mask)`, ns of one run; see Note [Linear in tiles].

    small, large: the lengths that are run. groups: how many times the measured heads run one after
    the other on a core, start and end of the kernel counted once.
    """

    measure: Callable[[int, int, str], float]
    fixed_ns: float = 0.0
    groups: int = 1
    small: int = 1024
    large: int = 3072
    dma_share: float = 0.0
    guess_share: float = 0.0
    _known: dict[tuple[int, int, str], float] = field(default_factory=dict)

    def rectangle_ns(self, q_len: int, k_len: int, mask: str) -> float:
        """ns for all groups: run as it is up to `small`, extrapolated beyond."""
        if max(q_len, k_len) <= self.small and q_len % ROWS == k_len % ROWS == 0:
            once = self._run(q_len, k_len, mask)
        else:
            once = self._full(q_len, k_len) if mask == "full" else self._diagonal(q_len, mask)
        return self.fixed_ns + self.groups * (once - self.fixed_ns)

    def _run(self, q_len: int, k_len: int, mask: str) -> float:
        key = (q_len, k_len, mask)
        if key not in self._known:
            self._known[key] = self.measure(*key)
        return self._known[key]

    def _full(self, q_len: int, k_len: int) -> float:
        a, b = self.small, self.large
        x, y = (q_len - a) / (b - a), (k_len - a) / (b - a)
        corner = [[self._run(q, k, "full") for k in (a, b)] for q in (a, b)]
        low = corner[0][0] + y * (corner[0][1] - corner[0][0])
        high = corner[1][0] + y * (corner[1][1] - corner[1][0])
        return low + x * (high - low)

    def _diagonal(self, length: int, mask: str) -> float:
        """Rows and half squares; the price of one more key per row is the full rectangle's."""
        a, b = self.small, self.large
        quadratic = (
            (
                self._run(b, b, "full")
                - self._run(b, a, "full")
                - self._run(a, b, "full")
                + self._run(a, a, "full")
            )
            / (b - a) ** 2
            / 2
        )
        at_a, at_b = self._run(a, a, mask), self._run(b, b, mask)
        linear = (at_b - at_a - quadratic * (b * b - a * a)) / (b - a)
        return at_a + linear * (length - a) + quadratic * (length * length - a * a)


@dataclass(frozen=True)
class Busiest:
    """Bounds: the work of every resource, each extrapolated by itself; the largest counts."""

    resources: list[Timed]

    @property
    def dma_share(self) -> float:
        """As of each resource."""
        return self.resources[0].dma_share

    @property
    def guess_share(self) -> float:
        """As of each resource."""
        return self.resources[0].guess_share

    def rectangle_ns(self, q_len: int, k_len: int, mask: str) -> float:
        """ns of the busiest resource for a rectangle of this size."""
        return max(one.rectangle_ns(q_len, k_len, mask) for one in self.resources)
