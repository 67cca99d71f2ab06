"""nki.collectives: communication between ranks, under the vendor's names.

All ranks of a group meet in the call and the data are there when it returns; how long a transfer
may take is the cost model's business, and what may overlap it is in ranks/races.py.
"""

from __future__ import annotations

import inspect

from nxd_cp.simulators.nki_api.arguments import guarded
from nxd_cp.simulators.nki_api.isa.issue import issue
from nxd_cp.simulators.nki_api.registers import Register
from nxd_cp.simulators.nki_api.runtime import current

from .dense import all_gather, all_reduce, all_to_all, reduce_scatter
from .group import ReplicaGroup
from .permute import (
    collective_permute,
    collective_permute_implicit,
    collective_permute_implicit_current_processing_rank_id,
    collective_permute_implicit_reduce,
)
from .variable import all_gather_v, all_to_all_v


def rank_id(name: str | None = None) -> Register:
    """A register with this rank's number among all ranks."""
    run = current("nki.collectives.rank_id")
    issue(run, "rank_id", "all", None, (), 0)
    return Register(run.place.rank)


__all__ = [
    "ReplicaGroup",
    "all_gather",
    "all_gather_v",
    "all_reduce",
    "all_to_all",
    "all_to_all_v",
    "collective_permute",
    "collective_permute_implicit",
    "collective_permute_implicit_current_processing_rank_id",
    "collective_permute_implicit_reduce",
    "rank_id",
    "reduce_scatter",
]

for _name in __all__:
    if inspect.isfunction(globals()[_name]):
        globals()[_name] = guarded("nki.collectives", globals()[_name])
