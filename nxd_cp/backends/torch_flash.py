"""Attention over one rectangle with PyTorch's own operators.

Does: call PyTorch's CPU flash attention, which returns the lse and reads fewer KV heads natively;
elsewhere, compute plainly over blocks of query rows. Both work in fp32: 16-bit inputs are widened
first, so that a block is never rounded on its way to the merge.
Does not: call the fused CUDA operators (they return 16-bit blocks); an accelerator takes the plain
path, which is exact but not fast. Letters as in `base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.backends import torch_bounded
from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.reference import block_backward, block_forward
from nxd_cp.schedule import Bounded, Mask, Plan

Gradients = tuple[Tensor, Tensor, Tensor]

_QUERY_BLOCK = 512  # rows of scores that the plain path holds at a time


class TorchBackend:
    """PyTorch operators; stateless."""

    name = "torch"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        q, k, v = _widened(q, k, v)
        if isinstance(mask, Bounded | Documents):
            return torch_bounded.forward(q, k, v, mask=mask, scale=scale, flash=has_flash(q))
        if mask == "strict":
            return _strict_forward(q, k, v, scale)
        if has_flash(q):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask == "causal", scale=scale
            )
        return _plain_forward(q, k, v, mask, scale)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor,
        *,
        mask: BlockMask,
        scale: float,
    ) -> Gradients:
        """See `Backend.backward`."""
        do, q, k, v, o = _widened(do, q, k, v, o)
        if isinstance(mask, Bounded | Documents):
            return torch_bounded.backward(
                do, q, k, v, o, lse, delta, mask=mask, scale=scale, flash=has_flash(q)
            )
        if mask == "strict":
            return _strict_backward(do, q, k, v, o, lse, delta, scale)
        if has_flash(q):
            # With lse = -inf the operator computes exp(s + inf); +inf makes those rows zero.
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, mask == "causal", scale=scale
            )
        return _plain_backward(do, q, k, v, lse, delta, mask, scale)

    def validate(self, q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, rank: int) -> None:
        """Every shape and length that the ring accepts is accepted."""


def has_flash(q: Tensor) -> bool:
    """True where PyTorch's flash attention that returns an fp32 block and its lse can be used."""
    return q.device.type == "cpu" and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    )


def _widened(*tensors: Tensor) -> list[Tensor]:
    """fp32, and rows that lie in one piece: the flash operators read wrong numbers otherwise."""
    widened = (x.float() for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in widened]


def _strict_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row i sees keys 0..i-1: the causal block of rows 1.. and keys ..-1, and an empty row 0."""
    o = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:-1], -torch.inf)
    if q.shape[2] > 1:
        o[:, :, 1:], lse[:, :, 1:] = TorchBackend().forward(
            q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], mask="causal", scale=scale
        )
    return o, lse


def _strict_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> Gradients:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.shape[2] > 1:
        dq[:, :, 1:], dk[:, :, :-1], dv[:, :, :-1] = TorchBackend().backward(
            do[:, :, 1:],
            q[:, :, 1:],
            k[:, :, :-1],
            v[:, :, :-1],
            o[:, :, 1:],
            lse[:, :, 1:],
            delta[:, :, 1:],
            mask="causal",
            scale=scale,
        )
    return dq, dk, dv


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1])
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, q.shape[2]))
        o[:, :, rows], lse[:, :, rows] = block_forward(
            q[:, :, rows], k, v, mask=mask, scale=scale, first_row=start
        )
    return o, lse


def _plain_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Mask,
    scale: float,
) -> Gradients:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, q.shape[2]))
        dq[:, :, rows], dk_rows, dv_rows = block_backward(
            do[:, :, rows],
            q[:, :, rows],
            k,
            v,
            lse[:, :, rows],
            delta[:, :, rows],
            mask=mask,
            scale=scale,
            first_row=start,
        )
        dk += dk_rows
        dv += dv_rows
    return dq, dk, dv
