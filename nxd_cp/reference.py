"""Attention and its gradients in plain PyTorch: the truth that everything else is compared with.

Does: compute in the dtype of its inputs (fp64 for truth), full, causal, strict and bounded masks,
or a bool tensor [M, J] or [B, 1, M, J], True where a key is hidden; grouped KV heads, values of
another head dim, soft-capped scores, sinks, and the partial gradients of one rectangle of a longer
row. Does not: care about speed; the scores of the rows it is given are held whole.

    s = scale * q k^T     lse = log sum exp s     p = exp(s - lse)     o = p v
    dv = p^T do           ds = p * (do v^T - delta), delta = rowsum(do * o)
    dq = scale * ds k     dk = scale * ds^T q
    with a softcap c      s = c tanh(scale * q k^T / c), and ds is multiplied by 1 - (s / c)^2
    with sinks a          lse = log(exp a + sum exp s)      da = -sum of exp(a - lse) * delta

Letters: B batch, H query heads, G key/value heads (G divides H), M query rows, J keys, D head dim.
Source: FlashAttention-2 (arXiv 2307.08691), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.schedule import Bounded, Mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, H, M, Dv] and lse [B, H, M] of q [B, H, M, D], k [B, G, J, D] and v [B, G, J, Dv].

    sinks: [H]. All in q's dtype.
    """
    o, lse = block_forward(q, k, v, mask=mask, scale=scale, softcap=softcap)
    if sinks is None:
        return o, lse
    total = torch.logaddexp(lse, sinks.view(-1, 1))
    return o * torch.exp(lse - _empty_is_plus_infinity(total)).unsqueeze(-1), total


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv of `attention`, in the shapes of q, k and v; and dsinks [H] where there are."""
    o, lse = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
    delta = (do * o).sum(-1)
    gradients = block_backward(do, q, k, v, lse, delta, mask=mask, scale=scale, softcap=softcap)
    if sinks is None:
        return gradients
    weight = torch.exp(sinks.view(-1, 1) - _empty_is_plus_infinity(lse))
    return (*gradients, -(weight * delta).sum((0, 2)))


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor,
    scale: float,
    softcap: float | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rows first_row.. of `attention`. A row that sees nothing returns o = 0 and lse = -inf."""
    B, _, M, _ = q.shape
    s = _hide(_scores(q, k, scale, softcap), mask, first_row)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - _empty_is_plus_infinity(lse).unsqueeze(-1))
    o = _stack(p) @ v
    return o.reshape(B, -1, M, v.shape[-1]), lse.reshape(B, -1, M)


def block_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    mask: Mask | Tensor,
    scale: float,
    softcap: float | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial gradients of these rows and keys; lse and delta [B, H, M] are those of whole rows."""
    B, H, M, D = q.shape
    G = k.shape[1]
    grouped = (B, G, H // G, M, 1)
    s = _scores(q, k, scale, softcap)
    p = torch.exp(_hide(s, mask, first_row) - _empty_is_plus_infinity(lse).reshape(grouped))
    do_stacked, q_stacked = do.reshape(B, G, -1, v.shape[-1]), q.reshape(B, G, -1, D)
    dp = (do_stacked @ v.transpose(-1, -2)).reshape(p.shape)
    ds = p * (dp - delta.reshape(grouped))
    if softcap is not None:
        ds = ds * (1 - (s / softcap).square())
    ds = _stack(ds) * scale
    dq = (ds @ k).reshape(B, H, M, D)
    return dq, ds.transpose(-1, -2) @ q_stacked, _stack(p).transpose(-1, -2) @ do_stacked


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[B, G, H/G, M, J], before any mask. Query heads of a group share one matmul."""
    B, H, M, D = q.shape
    G, J = k.shape[1:3]
    s = (q.reshape(B, G, -1, D) @ k.transpose(-1, -2)).reshape(B, G, H // G, M, J) * scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def _hide(s: Tensor, mask: Mask | Tensor, first_row: int) -> Tensor:
    """-inf where nothing is visible."""
    if isinstance(mask, Tensor):
        return s.masked_fill(mask if mask.dim() == 2 else mask.unsqueeze(1), -torch.inf)
    if mask == "full":
        return s
    M, J = s.shape[-2:]
    return s.masked_fill(hidden(mask, M, J, s.device, first_row=first_row), -torch.inf)


def hidden(
    mask: Mask, num_rows: int, num_keys: int, device: torch.device, *, first_row: int = 0
) -> Tensor:
    """bool [num_rows, num_keys], True where a key is not seen. The first row is `first_row`."""
    row = torch.arange(first_row, first_row + num_rows, device=device).unsqueeze(-1)
    key = torch.arange(num_keys, device=device)
    if isinstance(mask, Bounded):
        return (key < row + mask.low) | (key > row + mask.high)
    if mask == "full":
        return torch.zeros(num_rows, num_keys, dtype=torch.bool, device=device)
    return key > row if mask == "causal" else key >= row


def _stack(x: Tensor) -> Tensor:
    """[B, G, H/G, M, J] to [B, G, H/G * M, J]."""
    return x.flatten(2, 3)


def _empty_is_plus_infinity(lse: Tensor) -> Tensor:
    """Then exp(s - lse) is 0 in a row that sees nothing, whatever s is; -inf would give NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
