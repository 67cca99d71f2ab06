"""Activation checkpointing that does not run the ring twice.

Does: tell `torch.utils.checkpoint` to keep what `ring_attention` returned, and to recompute all
else. Does not: checkpoint by itself.

    from torch.utils.checkpoint import checkpoint
    y = checkpoint(block, x, use_reentrant=False, context_fn=nxd_cp.keep_attention)

The output of each attention (in the dtype of q) and its lse (fp32, one number per row and head)
stay in memory; q, k and v are recomputed, the ring and its messages are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nxd_cp import ops  # noqa: F401  (registers the op that the policy names)


def keep_attention() -> Any:
    """The two contexts that `checkpoint(..., context_fn=keep_attention)` asks for."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.nxd_cp.ring_forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
