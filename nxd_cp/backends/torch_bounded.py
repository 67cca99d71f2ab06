"""Masks of sliding windows and packed documents with PyTorch's operators.

Does: cut a rectangle into blocks of query rows, and compute each with the few keys that it sees.
Does not: choose the operator (`torch_flash.py`); a block uses flash attention with an additive mask
where it may, and else the plain maths. Inputs are fp32. Letters as in `base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nxd_cp.backends.base import Documents
from nxd_cp.backends.intervals import as_band
from nxd_cp.reference import block_backward, block_forward, hidden
from nxd_cp.schedule import Bounded

_QUERY_BLOCK = 256  # narrow windows want few rows, wide ones many

Block = tuple[slice, slice, Tensor]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Bounded | Documents,
    scale: float,
    softcap: float | None,
    flash: bool,
) -> tuple[Tensor, Tensor]:
    """As `Backend.forward`; rows that see nothing are in no block."""
    o, lse = q.new_zeros((*q.shape[:-1], v.shape[-1])), q.new_full(q.shape[:-1], -torch.inf)
    for rows, keys, unseen in _blocks(mask, q, k):
        q_rows, k_keys, v_keys = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        if flash:
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_rows, k_keys, v_keys, attn_mask=_bias(unseen), scale=scale
            )
        else:
            part = block_forward(q_rows, k_keys, v_keys, mask=unseen, scale=scale, softcap=softcap)
        empty = unseen.all(-1)  # flash gives these rows an lse of 0
        o[:, :, rows] = part[0].masked_fill(empty.unsqueeze(-1), 0.0)
        lse[:, :, rows] = part[1].masked_fill(empty, -torch.inf)
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    mask: Bounded | Documents,
    scale: float,
    softcap: float | None,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.backward`."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(s - inf) is 0, also in flash
    for rows, keys, unseen in _blocks(mask, q, k):
        do_rows, q_rows, lse_rows = do[:, :, rows], q[:, :, rows], lse[:, :, rows]
        k_keys, v_keys = k[:, :, keys], v[:, :, keys]
        if flash:
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_rows,
                q_rows,
                k_keys,
                v_keys,
                o[:, :, rows],
                lse_rows,
                0.0,
                False,
                attn_mask=_bias(unseen),
                scale=scale,
            )
        else:
            part = block_backward(
                do_rows,
                q_rows,
                k_keys,
                v_keys,
                lse_rows,
                delta[:, :, rows],
                mask=unseen,
                scale=scale,
                softcap=softcap,
            )
        dq[:, :, rows] = part[0]
        dk[:, :, keys] += part[1]
        dv[:, :, keys] += part[2]
    return dq, dk, dv


def _blocks(mask: Bounded | Documents, q: Tensor, k: Tensor) -> Iterator[Block]:
    """Blocks of rows that see something, the keys that they see, and what is hidden between them.

    Hidden is bool, [rows, keys], or with documents [B, 1, rows, keys].
    """
    num_rows, num_keys, device = q.shape[2], k.shape[2], q.device
    documents = mask if isinstance(mask, Documents) else None
    band = as_band(mask.mask if isinstance(mask, Documents) else mask, num_rows, num_keys)
    first, stop = max(0, -band.high), min(num_rows, num_keys - band.low)
    for start in range(first, stop, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, stop))
        keys = slice(max(0, start + band.low), min(num_keys, rows.stop + band.high))
        if documents is None:
            yield rows, keys, _hidden(band, rows, keys, device)
        else:
            yield from _document_block(documents, band, rows, keys)


def _document_block(mask: Documents, band: Bounded, rows: slice, keys: slice) -> Iterator[Block]:
    """The block cut to the keys of its documents; nothing when it sees none."""
    q_ids, k_ids = mask.q_ids[:, rows], mask.k_ids[:, keys]
    unseen = q_ids[:, None, :, None] != k_ids[:, None, None, :]
    unseen |= _hidden(band, rows, keys, q_ids.device)
    used = (~unseen).any(dim=2).any(dim=0)[0].nonzero()
    if len(used):
        first, last = int(used[0]), int(used[-1])
        cut = slice(keys.start + first, keys.start + last + 1)
        yield rows, cut, unseen[..., first : last + 1]


def _hidden(band: Bounded, rows: slice, keys: slice, device: torch.device) -> Tensor:
    band = band.within(rows.start, keys.start)
    return hidden(band, rows.stop - rows.start, keys.stop - keys.start, device)


def _bias(unseen: Tensor) -> Tensor:
    """What is added to the scores: 0 or minus infinity, fp32."""
    return torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -torch.inf)
