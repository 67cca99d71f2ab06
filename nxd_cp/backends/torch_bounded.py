"""A band of a rectangle with PyTorch's operators: the masks that a sliding window makes.

Does: cut the band into blocks of query rows, and compute each against the few keys that it sees.
Does not: choose the operator (`torch_flash.py`); a block uses flash attention with an additive mask
where that exists, and else the plain maths. Inputs are fp32. Letters as in `base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nxd_cp.reference import block_backward, block_forward, hidden
from nxd_cp.schedule import Bounded

_QUERY_BLOCK = 256  # narrow windows want few rows, wide ones many

Block = tuple[slice, slice, Bounded]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Bounded, scale: float, flash: bool
) -> tuple[Tensor, Tensor]:
    """As `Backend.forward`; rows that see nothing are in no block."""
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    for rows, keys, band in _blocks(mask, q.shape[2], k.shape[2]):
        q_rows, k_keys, v_keys = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        if flash:
            part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_rows, k_keys, v_keys, attn_mask=_bias(band, q_rows, k_keys), scale=scale
            )
        else:
            part = block_forward(q_rows, k_keys, v_keys, mask=band, scale=scale)
        o[:, :, rows], lse[:, :, rows] = part
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
    mask: Bounded,
    scale: float,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.backward`."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(s - inf) is 0, also in flash
    for rows, keys, band in _blocks(mask, q.shape[2], k.shape[2]):
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
                attn_mask=_bias(band, q_rows, k_keys),
                scale=scale,
            )
        else:
            part = block_backward(
                do_rows, q_rows, k_keys, v_keys, lse_rows, delta[:, :, rows], mask=band, scale=scale
            )
        dq[:, :, rows] = part[0]
        dk[:, :, keys] += part[1]
        dv[:, :, keys] += part[2]
    return dq, dk, dv


def _blocks(mask: Bounded, num_rows: int, num_keys: int) -> Iterator[Block]:
    """Blocks of rows that see something, the keys that they see, and the band between them."""
    first, stop = max(0, -mask.high), min(num_rows, num_keys - mask.low)
    for start in range(first, stop, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, stop))
        keys = slice(max(0, start + mask.low), min(num_keys, rows.stop + mask.high))
        yield rows, keys, mask.within(rows.start, keys.start)


def _bias(band: Bounded, q: Tensor, k: Tensor) -> Tensor:
    """What is added to the scores: 0 or minus infinity, [rows, keys] fp32."""
    unseen = hidden(band, q.shape[2], k.shape[2], q.device)
    return torch.zeros(unseen.shape, device=q.device).masked_fill_(unseen, -torch.inf)
