"""The contexts that all attention layers of an NxD model share, and NxD's ring held against them.

Where this process is in NxD's groups is asked in `nxd_cp.nxd_place`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from nxd_cp.context import CPContext
from nxd_cp.nxd_place import find_place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# One context per process group and layout, for as long as the group: its calls are numbered, so all
# attention layers share it, and tensors made with it may need it in a backward.
_CONTEXTS: WeakKeyDictionary[ProcessGroup, dict[str, CPContext]] = WeakKeyDictionary()
_CONTEXTS_LOCK = threading.Lock()


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
