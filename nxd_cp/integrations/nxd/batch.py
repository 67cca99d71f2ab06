"""NxD's batch helpers, for every layout and with global positions.

Does: what `neuronx_distributed.utils.batch_utils` does for the same batch, and adds
`position_ids`. Does not: pad. With `layout="contiguous"` every entry is what NxD's helper gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd.state import shared_context
from nxd_cp.sharding import IGNORE_INDEX, shard

SEQUENCE_DIM = 1
Batch = dict[str, Tensor | None]


def shift_labels(batch: Mapping[str, Tensor | None]) -> Batch:
    """A new dict whose `labels` [B, S] are one step to the left, IGNORE_INDEX at the end.

    All else is the same object. Small integer labels become int64, which can hold IGNORE_INDEX.
    """
    shifted = dict(batch)
    labels = shifted.get("labels")
    if labels is not None:
        end = torch.full((labels.shape[0], 1), IGNORE_INDEX, device=labels.device)
        shifted["labels"] = torch.cat((labels[:, 1:], end), dim=SEQUENCE_DIM)
    return shifted


def get_batch_on_this_context_parallel_rank(
    batch: Mapping[str, Tensor | None],
    cp: CPContext | None = None,
    *,
    layout: str = "zigzag",
    check_mask: bool = True,
) -> Mapping[str, Tensor | None]:
    """This rank's part of a batch that all ranks of the context-parallel group hold whole.

    As in NxD: on one rank the batch itself comes back, labels not shifted; on more, `labels` are
    shifted before the cut, entries are cut along dim 1, and None and entries of length 1 there pass
    as they are. Added: `position_ids` int64 [B, S / ranks], global, unless the batch has its own.

    cp: default the context of NxD's groups with `layout`, the one that `convert` uses.
    check_mask: look whether `attention_mask` [B, S] hides only right padding whose labels are
    IGNORE_INDEX (the ring does not read it, and causal attention need not); on an XLA device this
    look runs the graph, so False leaves it to you.

    Raises ValueError for a length that the layout cannot cut, an entry without dim 1, and a mask
    that would change the result.
    """
    context = shared_context(layout) if cp is None else cp
    validation.validate_flag("check_mask", check_mask)
    if context.size == 1:
        return batch
    if check_mask:
        _check_mask(batch)
    whole = shift_labels(batch)
    tokens = next((x for x in (whole.get("input_ids"), whole.get("labels")) if x is not None), None)
    if "position_ids" not in whole and tokens is not None:
        positions = torch.arange(tokens.shape[SEQUENCE_DIM], device=tokens.device)
        whole["position_ids"] = positions.expand(tokens.shape[:2])
    return {key: _cut(key, value, context) for key, value in whole.items()}


def _cut(key: str, value: Tensor | None, cp: CPContext) -> Tensor | None:
    if value is None:
        return None
    if value.dim() < 2:
        raise ValueError(
            f"{key}: expected [batch, sequence, ...], got {list(value.shape)}; keep what has no "
            "sequence dimension out of the batch"
        )
    return shard(value, cp, SEQUENCE_DIM) if value.shape[SEQUENCE_DIM] > 1 else value


def _check_mask(batch: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError for an attention_mask that causal attention would have to read."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected [batch, sequence], got {list(mask.shape)}; the ring "
            "does not read it: leave it out"
        )
    hidden = mask == 0
    right_padding = bool((hidden[:, 1:] >= hidden[:, :-1]).all()) and not bool(hidden[:, 0].any())
    counted = labels is not None and bool((labels[hidden] != IGNORE_INDEX).any())
    if not right_padding or counted or (labels is None and bool(hidden.any())):
        raise ValueError(
            "attention_mask: expected ones, and zeros only at the end of a row with the label "
            f"{IGNORE_INDEX}, got other zeros; the ring does not read it: pad on the right and set "
            "those labels"
        )
