"""Times without a device: the kernel's instructions in the simulator, priced by the cost model.

Estimates, never measurements; docs/timing.md says how good they are. No percentiles: an estimate
has a bound, an expected and a pessimistic time instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import Implementation, Inputs
from nxd_cp.bench.report import Times


@dataclass(frozen=True)
class SimulatedTimer:
    """Times a case on `target` ("trn1", "trn2", "trn3"; inf2 is trn1's generation)."""

    target: str
    source: str = "simulated"

    def time(self, case: Case, implementation: Implementation) -> Times:
        """The estimate of what the host launches for `case`, until the last core is done.

        implementation: this package's kernels in the simulator. No value is computed.
        """
        from nxd_cp.simulators.nki_api import SimParams, parameters, record
        from nxd_cp.simulators.timing import estimate_cores

        call = implementation.prepare(case, _zeros(case))
        with parameters(SimParams(values=False)), record() as log:
            call()
        cores = estimate_cores(log, generation(self.target)).values()
        slowest = max(cores, key=lambda core: core.expected_ns)
        return Times(
            "expected",
            {
                "bound": max(core.bound_ns for core in cores) / 1e3,
                "expected": slowest.expected_ns / 1e3,
                "pessimistic": max(core.pessimistic_ns for core in cores) / 1e3,
            },
            f"{100 * slowest.guess_share:.0f} % of the time rests on guesses",
        )


def _zeros(case: Case) -> Inputs:
    dtype = getattr(torch, case.dtype)
    q = torch.zeros(1, case.num_heads, case.queries, case.head_dim, dtype=dtype)
    k = torch.zeros(1, case.num_kv_heads, case.keys, case.head_dim, dtype=dtype)
    row = torch.zeros(q.shape[:-1])
    return Inputs(q, k, k, q, q.float(), row, row)


def generation(target: str) -> str:
    """ "gen2", "gen3" or "gen4". Raises ValueError for an unknown target."""
    from nxd_cp.simulators.timing import constants_for

    return constants_for("trn1" if target == "inf2" else target).generation


def peak_tflops(target: str, cores: int = 1) -> float:
    """bf16 matmul peak of `cores` physical cores, TFLOP/s: 2 x 128 x 128 per TensorE cycle."""
    from nxd_cp.simulators.timing import constants_for

    clock_ghz = constants_for(generation(target)).tensor_clock.expected
    return 2 * 128 * 128 * clock_ghz * cores / 1e3
