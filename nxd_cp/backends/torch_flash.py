"""Attention over one rectangle with PyTorch's own operators.

Does: call PyTorch's CPU flash attention, which returns the lse and reads fewer KV heads natively;
elsewhere, and for soft-capped scores, compute plainly over blocks of query rows. Both work in fp32:
16-bit inputs are widened first, so that a block is never rounded on its way to the merge.
Does not: call the fused CUDA operators (they return 16-bit blocks); an accelerator takes the plain
path, which is exact but not fast. Letters as in `base.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from nxd_cp.backends import torch_bounded
from nxd_cp.backends.base import Carry, Documents, Pair, QueryRows, Scores
from nxd_cp.merging import merge_
from nxd_cp.reference import block_backward, block_forward
from nxd_cp.schedule import Bounded, Plan

Gradients = tuple[Tensor, Tensor, Tensor]

_QUERY_BLOCK = 512  # rows of scores that the plain path holds at a time
_PIECE_BYTES = 2**20  # of a result that is merged into another


class TorchBackend:
    """PyTorch operators; stateless."""

    name = "torch"
    carries = False

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        carry: Carry | None = None,
        out: Pair | None = None,
    ) -> Pair:
        """See `Backend.forward`; into a carry by some heads at a time: no block is held whole."""
        result = out if carry is None else carry
        if result is None:
            return _forward(q, k, v, scores)
        o, lse = result
        for heads, kv_heads in head_pieces(q.shape[1], k.shape[1], _heads_at_once(o)):
            part = _forward(q[:, heads], k[:, kv_heads], v[:, kv_heads], scores)
            if carry is None:
                o[:, heads], lse[:, heads] = part
            else:
                merge_(o[:, heads], lse[:, heads], *part)
            del part  # before the next one needs room
        return o, lse

    def as_carry(self, o: Tensor, lse: Tensor) -> Pair:
        """See `Backend.as_carry`; nothing is added."""
        return o, lse

    def backward(
        self, rows: QueryRows, k: Tensor, v: Tensor, scores: Scores, carry: Tensor | None = None
    ) -> Gradients:
        """See `Backend.backward`."""
        dq, dk, dv = _backward(rows, k, v, scores)
        if carry is not None:
            dq = carry.add_(dq)
        return dq, dk, dv

    def row_delta(self, do: Tensor, o: Tensor) -> Tensor:
        """See `Backend.row_delta`; head by head, so that no product is held whole."""
        heads = range(o.shape[1])
        return torch.stack([(do[:, h].float() * o[:, h].float()).sum(-1) for h in heads], dim=1)

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


def _heads_at_once(o: Tensor) -> int:
    """Query heads whose part of o [B, H, S, Dv] is within `_PIECE_BYTES`; at least one."""
    return max(1, _PIECE_BYTES * o.shape[1] // (o.numel() * torch.float32.itemsize))


def head_pieces(num_heads: int, num_kv_heads: int, together: int) -> list[tuple[slice, slice]]:
    """Query heads, at most `together` of them, and the key/value heads they read."""
    group = num_heads // num_kv_heads
    if together >= group:
        step = together // group
        kv = [slice(i, min(i + step, num_kv_heads)) for i in range(0, num_kv_heads, step)]
        return [(slice(one.start * group, one.stop * group), one) for one in kv]
    return [
        (slice(start, min(start + together, first + group)), slice(index, index + 1))
        for index, first in enumerate(range(0, num_heads, group))
        for start in range(first, first + group, together)
    ]


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Pair:
    """This rectangle alone."""
    q, k, v = _widened(q, k, v)
    flash = scores.softcap is None and has_flash(q)
    v_dim = v.shape[-1]
    if flash:  # the operator knows one head dim
        q, k, v = _equal_head_dims(q, k, v)
    if isinstance(scores.mask, Bounded | Documents):
        o, lse = torch_bounded.forward(q, k, v, **vars(scores), flash=flash)
    elif scores.mask == "strict":
        o, lse = _strict_forward(q, k, v, scores)
    elif flash:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, scores.mask == "causal", scale=scores.scale
        )
    else:
        o, lse = _plain_forward(q, k, v, scores)
    return o[..., :v_dim], lse


def _backward(rows: QueryRows, k: Tensor, v: Tensor, scores: Scores) -> Gradients:
    """Of this rectangle alone."""
    do, q, k, v, o = _widened(rows.do, rows.q, k, v, rows.o)
    flash = scores.softcap is None and has_flash(q)
    q_dim, v_dim = q.shape[-1], v.shape[-1]
    if flash:
        do, q, k, v, o = _equal_head_dims(do, q, k, v, o)
    rows = QueryRows(do, q, o, rows.lse, rows.delta)
    if isinstance(scores.mask, Bounded | Documents):
        dq, dk, dv = torch_bounded.backward(
            do, q, k, v, o, rows.lse, rows.delta, **vars(scores), flash=flash
        )
    elif scores.mask == "strict":
        dq, dk, dv = _strict_backward(rows, k, v, scores)
    elif flash:
        # With lse = -inf the operator computes exp(s + inf); +inf makes those rows zero.
        lse = rows.lse.masked_fill(rows.lse == -torch.inf, torch.inf)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, scores.mask == "causal", scale=scores.scale
        )
    else:
        dq, dk, dv = _plain_backward(rows, k, v, scores)
    return dq[..., :q_dim], dk[..., :q_dim], dv[..., :v_dim]


def _strict_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Pair:
    """Row i sees keys 0..i-1: a causal block of rows 1.. and keys ..-1, and an empty row 0."""
    o = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full(q.shape[:-1], -torch.inf)
    if q.shape[2] > 1:
        causal = replace(scores, mask="causal")
        o[:, :, 1:], lse[:, :, 1:] = _forward(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], causal)
    return o, lse


def _strict_backward(rows: QueryRows, k: Tensor, v: Tensor, scores: Scores) -> Gradients:
    dq, dk, dv = torch.zeros_like(rows.q), torch.zeros_like(k), torch.zeros_like(v)
    if dq.shape[2] > 1:
        causal, later = replace(scores, mask="causal"), rows.at(slice(1, None))
        dq[:, :, 1:], dk[:, :, :-1], dv[:, :, :-1] = _backward(
            later, k[:, :, :-1], v[:, :, :-1], causal
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


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Pair:
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1])
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, q.shape[2]))
        o[:, :, rows], lse[:, :, rows] = block_forward(
            q[:, :, rows], k, v, **vars(scores), first_row=start
        )
    return o, lse


def _plain_backward(rows: QueryRows, k: Tensor, v: Tensor, scores: Scores) -> Gradients:
    dq, dk, dv = torch.empty_like(rows.q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, dq.shape[2], _QUERY_BLOCK):
        some = slice(start, min(start + _QUERY_BLOCK, dq.shape[2]))
        x = rows.at(some)
        dq[:, :, some], dk_rows, dv_rows = block_backward(
            x.do, x.q, k, v, x.lse, x.delta, **vars(scores), first_row=start
        )
        dk += dk_rows
        dv += dv_rows
    return dq, dk, dv
