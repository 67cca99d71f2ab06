"""This process's context-parallel group, as NxD's `parallel_state` tells it.

Does: import NxD when asked, and translate its global ranks into group ranks. Does not: initialise
anything. Another module with the same five functions can stand in for `parallel_state`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd.mesh import TP4_ON_TRN1

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODULE = "neuronx_distributed.parallel_layers.parallel_state"

# One context per process group and layout, for as long as the group: its calls are numbered, so all
# attention layers share it, and tensors made with it may need it in a backward.
_CONTEXTS: WeakKeyDictionary[ProcessGroup, dict[str, CPContext]] = WeakKeyDictionary()
_CONTEXTS_LOCK = threading.Lock()


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


def shared_context(layout: str, parallel_state: Any = None) -> CPContext:
    """The context of this layout that `convert`, `patch` and the batch helper share."""
    group = find_place(parallel_state).group
    with _CONTEXTS_LOCK:
        contexts = _CONTEXTS.setdefault(group, {})
        if layout not in contexts:
            contexts[layout] = CPContext.from_nxd(layout=layout, parallel_state=parallel_state)
        return contexts[layout]


def check_ring(cp: CPContext, rank_id: int, src_tgt_pairs: Sequence[Sequence[int]]) -> None:
    """The pairs of NxD's kernels must be `cp`'s ring, one (source, target) per rank.

    rank_id: global rank. src_tgt_pairs: global ranks. Raises ValueError when they are not.
    """
    following = {int(source): int(target) for source, target in src_tgt_pairs}
    ring = [int(rank_id)]
    while following.get(ring[-1], ring[0]) not in ring:
        ring.append(following[ring[-1]])
    closed = following.get(ring[-1]) == ring[0] and len(ring) == len(src_tgt_pairs)
    start = cp.ring_order.index(cp.rank)
    turn = [cp.transport.global_ranks[r] for r in cp.ring_order[start:] + cp.ring_order[:start]]
    if not closed or ring != turn:
        raise ValueError(
            f"rank_id and src_tgt_pairs: expected the ring {turn} of this rank's context, got rank "
            f"{rank_id} and {list(src_tgt_pairs)}; pass torch.distributed.get_rank() and "
            "get_context_model_parallel_src_tgt_pairs()"
        )
