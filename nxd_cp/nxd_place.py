"""This process's context-parallel group, as NxD's `parallel_state` tells it.

Does: import NxD when asked, and translate its global ranks into group ranks. Does not: initialise
anything, or make a context. Another module with the same three functions can stand in for
`parallel_state`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODULE = "neuronx_distributed.parallel_layers.parallel_state"
TP4_ON_TRN1 = (
    "NxD's initialize_model_parallel cannot make these groups on trn1: it lays its expert mesh out "
    "for TP = 4 without counting context parallelism and ends in 'shape is invalid'; use another "
    "tensor-parallel size (2, 8, 16, 32), or context_parallel_size=1"
)


@dataclass(frozen=True)
class Place:
    """group: the process group. rings: global ranks of every group of the world, in ring order.
    rank: this process's global rank. ring_order: our own ring as group ranks.
    """

    group: ProcessGroup
    rings: tuple[tuple[int, ...], ...]
    rank: int
    ring_order: tuple[int, ...]

    @property
    def on_xla(self) -> bool:
        """Whether the group is one of XLA devices, where only the graph communicates."""
        return str(dist.get_backend(self.group)) == "xla"


def load_parallel_state() -> ModuleType:
    """NxD's own module. Raises ValueError where NxD cannot be imported."""
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise ValueError(
            f"expected neuronx-distributed to be installed, got {type(error).__name__}: {error} "
            "(the package of that name on PyPI is a placeholder); install it from AWS's index, or "
            "use CPContext.from_group or CPContext.from_mesh"
        ) from error


def find_place(parallel_state: Any = None) -> Place:
    """Where this process is. parallel_state: NxD's module (the default) or a stand-in.

    Raises ValueError when NxD has not made its groups yet, or when they contradict each other.
    """
    state = load_parallel_state() if parallel_state is None else parallel_state
    try:
        group = state.get_context_model_parallel_group()
        replica_groups = state.get_context_model_parallel_replica_groups()
    except AssertionError as error:
        raise ValueError(
            f"expected NxD's context-parallel groups to exist, got: {error}; call "
            "initialize_model_parallel(..., context_parallel_size=n) first, or make the context "
            "inside the function that you give to initialize_parallel_model. If that call failed "
            f"with TP = 4: {TP4_ON_TRN1}"
        ) from error
    members = dist.get_process_group_ranks(group)
    rank = dist.get_rank()
    rings = [tuple(ring) for ring in replica_groups if rank in ring]
    if len(rings) != 1 or sorted(rings[0]) != sorted(members):
        raise ValueError(
            f"expected one replica group with the ranks {members} of rank {rank}'s "
            f"context-parallel process group, got {rings}; initialise NxD's model parallelism anew"
        )
    size = state.get_context_model_parallel_size()
    if size != len(members):
        raise ValueError(
            f"expected a context-parallel size of {len(members)} ranks as in the process group, "
            f"got {size} (set_context_model_parallel_size?)"
        )
    every_ring = tuple(tuple(ring) for ring in replica_groups)
    return Place(group, every_ring, rank, tuple(members.index(other) for other in rings[0]))
