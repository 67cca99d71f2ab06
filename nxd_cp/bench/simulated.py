"""Times without a device: the kernel's instructions in the simulator, priced by the cost model.

Estimates, never measurements; docs/timing.md says how good they are. No percentiles: an estimate
has a bound, an expected and a pessimistic time instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import Implementation
from nxd_cp.bench.report import Times


@dataclass(frozen=True)
class SimulatedTimer:
    """Times a case on `target` ("trn1", "trn2", "trn3"; inf2 is trn1's generation)."""

    target: str
    source: str = "simulated"

    def time(self, case: Case, implementation: Implementation) -> Times:
        """The estimate of one launch on one physical core; this package's kernels only."""
        from nxd_cp.simulators.cluster.measure import time_kernel

        found = time_kernel(
            case.kernel,
            generation(self.target),
            q_len=case.queries,
            k_len=case.keys,
            mask=case.mask,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            dtype=case.dtype,
        )
        return Times(
            "expected",
            {
                "bound": found.bound_ns / 1e3,
                "expected": found.expected_ns / 1e3,
                "pessimistic": found.pessimistic_ns / 1e3,
            },
            f"{100 * found.guess_share:.0f} % of the time rests on guesses",
        )


def generation(target: str) -> str:
    """ "gen2", "gen3" or "gen4". Raises ValueError for an unknown target."""
    from nxd_cp.simulators.timing import constants_for

    return constants_for("trn1" if target == "inf2" else target).generation


def peak_tflops(target: str, cores: int = 1) -> float:
    """bf16 matmul peak of `cores` physical cores, TFLOP/s: 2 x 128 x 128 per TensorE cycle."""
    from nxd_cp.simulators.timing import constants_for

    clock_ghz = constants_for(generation(target)).tensor_clock.expected
    return 2 * 128 * 128 * clock_ghz * cores / 1e3
