"""The masks that a Transformers model asks for: which "nxd_ring" takes, and which it refuses.

Does: look at padding, and at two diagonals of a model's mask function. Does not: make a mask;
`ring_attention` makes causal, windowed and document masks of positions and ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nxd_cp.sharding import IGNORE_INDEX


def check_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> None:
    """The mask half of "nxd_ring": returns None, for what ring_attention makes of positions itself,
    and refuses everything else that a model could want masked.

    Called by Transformers with the sizes and the mask as a function of indices. Two diagonals of
    that function tell a causal or windowed mask from packed, chunked and prefix masks.

    Raises ValueError naming what was found.
    """
    refuse_padding(attention_mask)
    if use_vmap:
        raise ValueError(
            "expected a causal, windowed or full mask, got one with the model's own mask function "
            "on top; ring attention would drop it"
        )
    if q_length != kv_length or q_length < 2:
        return
    causal = getattr(config, "is_causal", True)
    zero = torch.zeros((), dtype=torch.long, device=device)
    before = torch.arange(q_length - 1, device=device)
    rows = range(1 if attention_mask is None else attention_mask.shape[0])
    sees_past = all(_all(mask_function(zero + b, zero, before + 1, before)) for b in rows)
    sees_future = any(_any(mask_function(zero + b, zero, before, before + 1)) for b in rows)
    if not sees_past:
        raise ValueError(
            "expected every token to see the one before it, got a mask that hides it (packed or "
            "chunked attention); give the batch to hf.shard_batch, and packed documents as "
            "segment_ids"
        )
    if causal and sees_future:
        raise ValueError(
            "expected a causal mask, got one in which tokens see later ones (a prefix or block "
            "mask); ring attention would drop that"
        )


def refuse_padding(attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the mask [B, L] is absent or all ones."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask: expected ones only, got padding; pad on the right, give padded tokens "
            f"the label {IGNORE_INDEX} and leave the mask out (causal attention does not look "
            "there), or pack the sequences with segment_ids"
        )


def _all(value: Any) -> bool:
    return bool(torch.as_tensor(value).all())


def _any(value: Any) -> bool:
    return bool(torch.as_tensor(value).any())
