"""What prefill and decode have in common before they compute: checks, and agreement of the ranks.

A rank that refuses tells the others why, so that all raise at once and no cache is changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.debugging import fingerprint
from nxd_cp.inference.attend import Rule
from nxd_cp.inference.cache import KVCache


@dataclass(frozen=True)
class Places:
    """Where new tokens belong.

    counts: [B], new tokens of each sequence on all ranks. positions: [B, N] of the tokens given
    here. ours: the same, `EMPTY` for those that this rank does not store.
    """

    counts: Tensor
    positions: Tensor
    ours: Tensor


def agree(
    kind: str,
    cp: CPContext,
    cache: KVCache,
    tensors: tuple[Tensor, Tensor, Tensor],
    options: Mapping[str, Any],
    find_places: Callable[[], Places],
) -> tuple[Rule, Places]:
    """Check q, k, v and options; raise on all ranks when one rank's are wrong, or two differ.

    kind: "prefill" or "decode". options: scale, window, softcap and sinks, as the caller gave them.
    find_places: called when shapes are known to be right; may raise ValueError.
    """
    (q, k, v), sinks = tensors, options["sinks"]
    with cp.refusing(kind):
        _validate(q, k, v, cache, **options)
        rule = _rule(q, options["scale"], options["window"], options["softcap"])
        places = find_places()
        cache.check_room(places.ours)
    if cp.agrees:
        description = {
            "q": str(tuple(q.shape)),
            "k": str(tuple(k.shape)),
            "v": str(tuple(v.shape)),
            "dtype": str(q.dtype),
            "rule": str(rule),
            "sinks": "None" if sinks is None else "given",
            "tokens stored before": _fingerprint(cache.next_position),
            "new tokens": _fingerprint(places.counts),
            "values": fingerprint(sinks, *tensors) if kind == "decode" else fingerprint(sinks),
        }
        cp.agree_on(kind, description)
    return rule, places


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    scale: float | None,
    window: Any,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    validation.validate_tensors(q, k, v)
    batch, num_kv_heads, _, k_dim = cache.k.shape
    for name, x, dim in (("k", k, k_dim), ("v", v, cache.v.shape[3])):
        if (x.shape[0], x.shape[1], x.shape[3]) != (batch, num_kv_heads, dim):
            raise ValueError(
                f"{name}: expected [{batch}, {num_kv_heads}, tokens, {dim}] as in the cache, got "
                f"{tuple(x.shape)}"
            )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q: expected [{batch}, heads, {k.shape[2]}, {k_dim}] to go with k, got "
            f"{tuple(q.shape)}"
        )
    if (k.dtype, k.device) != (cache.k.dtype, cache.k.device):
        raise ValueError(
            f"k: expected {cache.k.dtype} on {cache.k.device} as in the cache, got {k.dtype} on "
            f"{k.device}; make the cache with this dtype and device, or cast q, k and v"
        )
    validation.validate_sinks(sinks, q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        raise ValueError(
            "inference: expected no gradients, got requires_grad=True; use torch.no_grad(), or "
            "ring_attention to train"
        )
    if scale is not None:
        validation.validate_scale(scale)
    validation.validate_window(window, causal=True)
    validation.validate_softcap(softcap)


def _rule(q: Tensor, scale: float | None, window: Any, softcap: float | None) -> Rule:
    """The rule of checked options; (left, 0) is a window of left + 1 keys."""
    if isinstance(window, tuple):
        window = None if window[0] is None else window[0] + 1
    return Rule(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)


def _fingerprint(counts: Tensor) -> str:
    """The sum, and a few characters that differ where two ranks differ."""
    return f"{int(counts.sum())} (crc {zlib.crc32(str(counts.tolist()).encode()):08x})"
