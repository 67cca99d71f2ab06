"""What `nxd-cp profile` and `nxd-cp trace` do: time a kernel and show where the time goes.

Does: run one of our kernels on a block, or anybody's kernel, in the simulator; estimate, print or
write. Does not: parse a command line (nxd_cp/timing_cli.py does).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nxd_cp.simulators.attention_block import AttentionBlock
from nxd_cp.simulators.cluster.measure import kernel_log
from nxd_cp.simulators.nki_api.log import Log

from . import plots, profile, trace
from .call import Call
from .estimate import Estimate, estimate_cores
from .progress import Progress


@dataclass(frozen=True, kw_only=True)
class Block(AttentionBlock):
    """One of our kernels on a block. generation: trn1, trn2, trn3 or gen2, gen3, gen4."""

    generation: str = "trn2"

    @property
    def target(self) -> str:
        """The kernel's name."""
        return self.kernel

    def run(self) -> Log:
        """The log of one core."""
        return kernel_log(
            self.kernel,
            self.generation,
            q_len=self.queries,
            k_len=self.keys,
            mask=self.mask,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )


def time_call(call: Block | Call) -> dict[str, Estimate]:
    """Estimates of all ranks and cores, by the name of their process; progress on stderr."""
    with Progress(f"simulating {call.target} on {call.generation}") as progress:
        log = call.run()
        count = sum(len(one) for one in log.cores.values())
        progress.say(f"timing {count} instructions")
        times = estimate_cores(log, call.generation)
    return {f"rank {rank} core {core}": one for (rank, core), one in times.items()}


def slowest(times: dict[str, Estimate]) -> str:
    """The name of the core that ends last."""
    return max(times, key=lambda name: times[name].expected_ns)


def run_profile(
    call: Block | Call,
    *,
    json_path: Path | None = None,
    roofline: Path | None = None,
    timeline: Path | None = None,
) -> str:
    """The table of a kernel; also written as JSON, roofline PNG and timeline PNG when asked.

    Of several cores the table and timeline are those of the slowest; the JSON has all.
    """
    times = time_call(call)
    name = slowest(times)
    if json_path is not None:
        cores = {core: profile.summary(one) for core, one in times.items()}
        text = json.dumps({**cores[name], "core": name, "cores": cores}, indent=1)
        json_path.write_text(text)
    if roofline is not None:
        labels = {call.target: times[name]} if len(times) == 1 else times
        plots.roofline_png(roofline, labels)
    if timeline is not None:
        plots.timeline_png(timeline, times[name].timeline)
    title = [] if len(times) == 1 else [_cores_line(times, name)]
    return "\n".join([*title, profile.table(times[name])])


def _cores_line(times: dict[str, Estimate], name: str) -> str:
    first = min(one.expected_ns for one in times.values())
    return (
        f"{len(times)} cores, the slowest is {name}; "
        f"the first ends after {first / 1e3:.1f} us, the last after "
        f"{times[name].expected_ns / 1e3:.1f} us"
    )


def run_trace(call: Block | Call, out: Path) -> str:
    """Write the Perfetto trace of a kernel to `out`; returns a line about it."""
    times = time_call(call)
    trace.write(out, {name: one.timeline for name, one in times.items()})
    count = sum(len(one.timeline.program) for one in times.values())
    longest = times[slowest(times)]
    return (
        f"{out}: {count} instructions on {len(times)} cores, {longest.expected_ns / 1e3:.1f} us "
        f"estimated, {100 * longest.guess_share:.0f} % of it rests on guesses; "
        "open it at ui.perfetto.dev"
    )
