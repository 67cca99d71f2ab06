"""What prefill and decode have in common before they compute: checks, and agreement of the ranks.

A rank that refuses tells the others why, so that all raise at once and no cache is changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from nxd_cp.context import CPContext
from nxd_cp.inference.attend import Rule
from nxd_cp.inference.cache import KVCache
from nxd_cp.transport import Call
from nxd_cp.transport.agreement import announce_refusal
from nxd_cp.validation import validate_scale


def agree(
    call: Call,
    cp: CPContext,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    rule: Rule,
    check: Callable[[], None],
    *,
    sinks: Tensor | None,
) -> None:
    """Run `check` and the common checks; raise on all ranks when one rank's fail, or two differ."""
    try:
        _validate_tensors(q, k, v, cache)
        _validate_options(q, rule, sinks)
        check()
    except ValueError as error:
        if cp.agrees:
            announce_refusal(call, cp.ring_order, str(error), q.device)
        raise
    if not cp.agrees:
        return
    stored = str(cache.next_position.tolist()).encode()
    description = {
        "call": f"{call.kind} {call.number}",
        "q": str(tuple(q.shape)),
        "k": str(tuple(k.shape)),
        "dtype": str(q.dtype),
        "rule": str(rule),
        "sinks": "None" if sinks is None else "given",
        "tokens stored before": f"{int(cache.next_position.sum())} (crc {zlib.crc32(stored):08x})",
    }
    cp.agree(call, description, q.device)


def _validate_tensors(q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> None:
    batch, num_kv_heads, _, head_dim = cache.k.shape
    for name, x, stored in (("k", k, cache.k), ("v", v, cache.v)):
        dim = stored.shape[3]
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, num_kv_heads, dim):
            raise ValueError(
                f"{name}: expected [{batch}, {num_kv_heads}, tokens, {dim}] as in the cache, got "
                f"{tuple(x.shape)}"
            )
        if x.dtype != stored.dtype or x.device != stored.device or q.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {stored.dtype} on {stored.device} as in the cache, and q too, "
                f"got {x.dtype} on {x.device} and q in {q.dtype}; make the cache with dtype and "
                "device of the model"
            )
    if q.dim() != 4 or (q.shape[0], *q.shape[2:]) != (batch, *k.shape[2:]):
        raise ValueError(
            f"q: expected [{batch}, heads, {k.shape[2]}, {head_dim}] to go with k, got "
            f"{tuple(q.shape)}"
        )
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected as many tokens as k, got {v.shape[2]} and {k.shape[2]}")
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"heads: expected a multiple of {num_kv_heads}, got {q.shape[1]}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "inference: expected no gradients, got requires_grad=True; use torch.no_grad(), or "
            "ring_attention to train"
        )


def _validate_options(q: Tensor, rule: Rule, sinks: Tensor | None) -> None:
    validate_scale(rule.scale)
    if rule.window is not None and rule.window < 1:
        raise ValueError(f"window: expected at least 1, got {rule.window}")
    if rule.softcap is not None and not rule.softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {rule.softcap}")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks: expected [{q.shape[1]}], got {tuple(sinks.shape)}")
