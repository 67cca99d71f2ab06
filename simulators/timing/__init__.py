"""A cost model of NeuronCores and an engine-level timeline, from instruction logs.

    from nxd_cp.simulators.timing import estimate
    times = estimate(log, "gen3")     # log: see nki_api.record
    times.bound_ns, times.expected_ns, times.pessimistic_ns, times.guess_share

Reading order: constants.py, gen3.py, cost.py, dma.py, program.py, edges.py, order.py, machine.py,
together.py, critical.py, then the views (profile.py, trace.py, plots.py).
Every number is an estimate from public documents and measurements; docs/timing.md says how good.
"""

from .constants import Constant, Constants, constants_for
from .estimate import Estimate, estimate, estimate_cores
from .program import Options, Program
from .timeline import Timeline
from .together import replay, replay_together

__all__ = [
    "Constant",
    "Constants",
    "Estimate",
    "Options",
    "Program",
    "Timeline",
    "constants_for",
    "estimate",
    "estimate_cores",
    "replay",
    "replay_together",
]
