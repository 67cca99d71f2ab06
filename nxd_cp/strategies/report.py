"""What `nxd-cp plan` prints: the strategies that a shape allows, what each costs, the choice.

Does: format `cost.compare`. Does not: decide or draw.
"""

from __future__ import annotations

from nxd_cp.schedule import Plan
from nxd_cp.strategies.cost import FIGURES, Cost, Shape, compare
from nxd_cp.strategies.plan import Strategy

MIB = 2**20


def report(plan: Plan, shape: Shape, chip: str, strategy: str) -> tuple[str, list[Cost]]:
    """The table, and the costs in it, the one that is taken first.

    strategy: the caller's, or "auto" for the rule's. Raises ValueError for one that these shapes do
    not allow.
    """
    costs = compare(plan, shape, chip)
    if strategy != "auto":
        Strategy(strategy)
        mine = [cost for cost in costs if cost.work.strategy.name == strategy]
        if not mine:
            allowed = sorted({cost.work.strategy.name for cost in costs})
            raise ValueError(
                f"strategy: expected one of {', '.join(allowed)} with {plan.size} ranks, "
                f"{shape.num_heads} query and {shape.num_kv_heads} key/value heads, got {strategy}"
            )
        costs = mine + [cost for cost in costs if cost not in mine]
    figures = FIGURES[chip]
    lines = [
        f"{'strategy':<10} {'messages':>8} {'sent':>10} {'kv hop':>10} {'grad hop':>10} "
        f"{'exchange':>10} {'buffers':>10} {'balance':>8} {'estimate':>11}"
    ]
    for cost in costs:
        sizes = (cost.sent_bytes, *cost.hop_bytes, cost.buffer_bytes)
        lines.append(
            f"{cost.work.strategy!s:<10} {cost.num_messages:>8} "
            + " ".join(f"{_size(size):>10}" for size in sizes)
            + f" {cost.balance:>8.3f} {cost.seconds * 1e3:>8.3f} ms"
        )
    by = "asked for" if strategy != "auto" else "by the rule (docs/strategies.md)"
    lines += [
        f"taken: {costs[0].work.strategy}, {by}",
        "one forward and backward of the busiest rank; estimated, not measured, from "
        f"{figures.tflops:g} TFLOP/s x {figures.efficiency:g} (assumed), {figures.gb_per_s:g} GB/s "
        f"per link, {figures.latency_us:g} us per message ({chip}: {figures.source})",
    ]
    return "\n".join(lines), costs


def _size(size_bytes: int) -> str:
    if size_bytes == 0:
        return "-"
    return f"{size_bytes / MIB:.2f} MiB" if size_bytes >= MIB / 100 else f"{size_bytes} B"
