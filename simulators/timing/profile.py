"""What a kernel's time goes into, as a table and as JSON.

Does: summarise an Estimate: three times, engine busy, bandwidth, critical path by source line,
stalls by cause, share that rests on guesses. Does not: time anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .constants import constants_for
from .critical import stalls, time_by_line
from .dma import Transfer
from .estimate import Estimate


@dataclass(frozen=True)
class Row:
    """One line of the table of resources."""

    name: str
    busy_ns: float
    share: float
    instructions: int


def resources(times: Estimate) -> list[Row]:
    """Busy time of every engine and queue over the expected total, busiest first."""
    line = times.timeline
    counts: dict[str, int] = {}
    for queue in line.program.queues:
        counts[queue] = counts.get(queue, 0) + 1
    rows = [
        Row(name, busy, busy / line.total_ns, counts.get(name, 0))
        for name, busy in line.resource_busy.items()
    ]
    return sorted(rows, key=lambda row: (-row.busy_ns, row.name))


def hbm_bytes(times: Estimate) -> tuple[int, int]:
    """(bytes read from HBM, bytes written to HBM) by DMA."""
    program = times.timeline.program

    def moved(views: tuple[int, ...]) -> int:
        sides = [program.accesses[view] for view in views]
        return sum(side.size_bytes for side in sides if side.space == "hbm")

    kept = [
        i for i, cost in enumerate(program.costs) if isinstance(cost, Transfer) and not cost.skipped
    ]
    return (
        sum(moved(program.reads[i]) for i in kept),
        sum(moved(program.writes[i]) for i in kept),
    )


def summary(times: Estimate) -> dict[str, Any]:
    """Everything as plain data, for tools."""
    read, written = hbm_bytes(times)
    line = times.timeline
    return {
        "generation": times.generation,
        "note": "estimated, not measured",
        "constants": constants_for(times.generation).note,
        "bound_us": times.bound_ns / 1e3,
        "bound_resource": times.bound_resource,
        "expected_us": times.expected_ns / 1e3,
        "pessimistic_us": times.pessimistic_ns / 1e3,
        "guess_share": times.guess_share,
        "time_by_tag_us": {tag: ns / 1e3 for tag, ns in times.by_tag.items()},
        "instructions": len(line.program),
        "mfu": times.mfu,
        "hbm_read_bytes": read,
        "hbm_written_bytes": written,
        "hbm_gb_per_s": (read + written) / times.expected_ns,
        "resources": [row.__dict__ for row in resources(times)],
        "critical_path_us": [
            {"file": file, "line": number, "us": ns / 1e3}
            for file, number, ns in time_by_line(line)
        ],
        "stalls_us": {
            queue: {cause: ns / 1e3 for cause, ns in causes.items()}
            for queue, causes in stalls(line).items()
        },
    }


def table(times: Estimate, *, num_lines: int = 10) -> str:
    """The summary as text."""
    data = summary(times)
    out = [
        f"{times.generation}, one core, estimated (not measured)",
        f"  constants {data['constants']}",
        f"  bound {data['bound_us']:.1f} us ({data['bound_resource']}), "
        f"expected {data['expected_us']:.1f} us, pessimistic {data['pessimistic_us']:.1f} us",
        f"  MFU {100 * data['mfu']:.1f} % of bf16 peak, HBM {data['hbm_gb_per_s']:.0f} GB/s, "
        f"{data['instructions']} instructions",
        "  expected time by kind of constant: "
        + ", ".join(
            f"{tag} {100 * us / data['expected_us']:.0f} %"
            for tag, us in data["time_by_tag_us"].items()
        ),
        "",
        f"  {'resource':<18}{'busy us':>12}{'share':>8}{'instructions':>14}",
    ]
    out += [
        f"  {row.name:<18}{row.busy_ns / 1e3:>12.1f}{100 * row.share:>7.1f}%{row.instructions:>14}"
        for row in resources(times)
    ]
    out += ["", f"  {'critical path by source line':<44}{'us':>10}"]
    for entry in data["critical_path_us"][:num_lines]:
        place = Path(entry["file"]).name + (f":{entry['line']}" if entry["line"] else "")
        out.append(f"  {place:<44}{entry['us']:>10.1f}")
    out += ["", f"  {'idle time by cause':<44}{'us':>10}"]
    for queue, causes in data["stalls_us"].items():
        for cause, us in sorted(causes.items(), key=lambda item: -item[1])[:3]:
            out.append(f"  {queue + ': ' + cause:<44}{us:>10.1f}")
    return "\n".join(out)
