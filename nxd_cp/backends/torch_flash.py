"""Attention over one rectangle with PyTorch's own operators.

Does: call PyTorch's CPU flash attention, which returns the lse and reads fewer KV heads natively;
elsewhere, and for soft-capped scores, compute plainly over blocks of query rows. Both work in fp32:
16-bit inputs are widened first, so that a block is never rounded on its way to the merge.
Does not: call the fused CUDA operators (they return 16-bit blocks); an accelerator takes the plain
path, which is exact but not fast. Letters as in `base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: BlockMask,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        q, k, v = _widened(q, k, v)
        flash = softcap is None and has_flash(q)
        v_dim = v.shape[-1]
        if flash:  # the operator knows one head dim
            q, k, v = _equal_head_dims(q, k, v)
        if isinstance(mask, Bounded | Documents):
            o, lse = torch_bounded.forward(
                q, k, v, mask=mask, scale=scale, softcap=softcap, flash=flash
            )
        elif mask == "strict":
            o, lse = self._strict_forward(q, k, v, scale, softcap)
        elif flash:
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask == "causal", scale=scale
            )
        else:
            o, lse = _plain_forward(q, k, v, mask, scale, softcap)
        return o[..., :v_dim], lse

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
        softcap: float | None = None,
    ) -> Gradients:
        """See `Backend.backward`."""
        do, q, k, v, o = _widened(do, q, k, v, o)
        flash = softcap is None and has_flash(q)
        q_dim, v_dim = q.shape[-1], v.shape[-1]
        if flash:
            do, q, k, v, o = _equal_head_dims(do, q, k, v, o)
        if isinstance(mask, Bounded | Documents):
            dq, dk, dv = torch_bounded.backward(
                do, q, k, v, o, lse, delta, mask=mask, scale=scale, softcap=softcap, flash=flash
            )
        elif mask == "strict":
            dq, dk, dv = self._strict_backward(do, q, k, v, o, lse, delta, scale, softcap)
        elif flash:
            # With lse = -inf the operator computes exp(s + inf); +inf makes those rows zero.
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, mask == "causal", scale=scale
            )
        else:
            dq, dk, dv = _plain_backward(do, q, k, v, lse, delta, mask, scale, softcap)
        return dq[..., :q_dim], dk[..., :q_dim], dv[..., :v_dim]

    def validate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan,
        rank: int,
        softcap: float | None = None,
        documents: bool = False,
    ) -> None:
        """Every shape, length and mask that the ring accepts is accepted."""

    def _strict_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Row i sees keys 0..i-1: a causal block of rows 1.. and keys ..-1, and an empty row 0."""
        o = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        lse = q.new_full(q.shape[:-1], -torch.inf)
        if q.shape[2] > 1:
            o[:, :, 1:], lse[:, :, 1:] = self.forward(
                q[:, :, 1:],
                k[:, :, :-1],
                v[:, :, :-1],
                mask="causal",
                scale=scale,
                softcap=softcap,
            )
        return o, lse

    def _strict_backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Gradients:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if q.shape[2] > 1:
            dq[:, :, 1:], dk[:, :, :-1], dv[:, :, :-1] = self.backward(
                do[:, :, 1:],
                q[:, :, 1:],
                k[:, :, :-1],
                v[:, :, :-1],
                o[:, :, 1:],
                lse[:, :, 1:],
                delta[:, :, 1:],
                mask="causal",
                scale=scale,
                softcap=softcap,
            )
        return dq, dk, dv


def has_flash(q: Tensor) -> bool:
    """True where PyTorch's flash attention that returns an fp32 block and its lse can be used."""
    return q.device.type == "cpu" and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    )


def _widened(*tensors: Tensor) -> list[Tensor]:
    """fp32, and rows that lie in one piece: the flash operators read wrong numbers otherwise."""
    widened = (x.float() for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in widened]


def _equal_head_dims(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the shorter rows: they change no score and no output but their own."""
    longest = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == longest else pad(x, (0, longest - x.shape[-1])) for x in tensors]


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1])
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, q.shape[2]))
        o[:, :, rows], lse[:, :, rows] = block_forward(
            q[:, :, rows], k, v, mask=mask, scale=scale, softcap=softcap, first_row=start
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
    softcap: float | None,
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
            softcap=softcap,
            first_row=start,
        )
        dk += dk_rows
        dv += dv_rows
    return dq, dk, dv
