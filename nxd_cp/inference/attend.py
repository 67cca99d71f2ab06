"""Attention over keys that lie in any order, masked by their positions; and the merge of parts.

Does: the plain maths in fp32, over blocks of query rows. Does not: communicate.

Letters: B batch, Hq query heads, Hkv key/value heads, M queries, J keys, D and Dv head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from nxd_cp import reference
from nxd_cp.backends import get_support_kernels, resolve_backend_name
from nxd_cp.inference.cache import EMPTY
from nxd_cp.merging import merge_

_QUERY_BLOCK = 256  # rows of scores that are held at a time

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """What turns scores into weights. window: keys that a query sees, its own included."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend(q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, rule: Rule) -> Result:
    """o [B, Hq, M, Dv] and lse [B, Hq, M], fp32; a query sees keys at its position and before.

    q_pos [B, M], k_pos [B, J]: positions; keys at `EMPTY` are seen by none.
    """
    parts = []
    k, v = k.float(), v.float()
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        hidden = _hidden(q_pos[:, rows], k_pos, rule.window)
        parts.append(
            reference.block_forward(
                q[:, :, rows].float(), k, v, mask=hidden, scale=rule.scale, softcap=rule.softcap
            )
        )
    o, lse = (torch.cat(one, dim=2) for one in zip(*parts, strict=True))
    return o, lse


def nothing_seen(q: Tensor, v: Tensor) -> Result:
    """o = 0 and lse = -inf for every query."""
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float32, device=q.device)
    return o, o.new_full(o.shape[:-1], -torch.inf)


def merge_all(parts: list[Result], sinks: Tensor | None, *, backend: str = "auto") -> Result:
    """The result over all parts and the sinks [Hq], in this order; new tensors.

    backend: as of `ring_attention`; its kernel merges results that lie on a Neuron device.
    """
    (o, lse), *others = parts
    if sinks is not None:
        others = [*others, (torch.zeros_like(o), sinks.float().view(1, -1, 1).expand_as(lse))]
    name = resolve_backend_name(backend, o.device)
    if name != "torch":
        return reduce(get_support_kernels(name).merge, others, (o, lse))
    o, lse = o.clone(), lse.clone()
    for o_part, lse_part in others:
        merge_(o, lse, o_part, lse_part)
    return o, lse


def _hidden(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """bool [B, 1, M, J], True where a key is not seen."""
    q_at, k_at = q_pos[:, None, :, None], k_pos[:, None, None, :]
    hidden = (k_at == EMPTY) | (k_at > q_at)
    return hidden if window is None else hidden | (k_at <= q_at - window)
