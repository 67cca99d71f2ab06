"""A prompt, or the next chunk of one, whose tokens are split over the ranks.

Does: attend with sharded queries and leave each rank's keys and values in its cache. A first prompt
is `ring_attention`; a later chunk sends every rank's cache once round the ring and masks by
position. Does not: gather a whole cache anywhere.

Letters: B batch, Hq query heads, Hkv key/value heads, L tokens of this rank, D and Dv head dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.attention import ring_attention
from nxd_cp.backends import resolve_backend_name
from nxd_cp.context import CPContext
from nxd_cp.documents import slot_positions
from nxd_cp.inference.arguments import Places, agree
from nxd_cp.inference.attend import Rule, attend, merge_all, nothing_seen
from nxd_cp.inference.cache import EMPTY, KVCache
from nxd_cp.merging import merge_
from nxd_cp.schedule import Window, ring_moves
from nxd_cp.transport import Call, Parcel


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: KVCache,
    cp: CPContext,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of a chunk of each sequence, which is stored in the cache.

    A collective call: every rank makes it.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, L, D]; v: [B, Hkv, L, Dv]: this rank's part of the chunk, in
            the order of the context's layout (see `nxd_cp.shard`).
        cache: this rank's part. When it holds tokens already, the chunk follows them.
        cp: the context.
        lengths: [B], tokens of each sequence in this chunk (of the whole chunk, not of this rank);
            default all. What lies behind them is padding: not stored, and its output means nothing.
        scale, window, softcap, sinks: as in `ring_attention`.
        backend: as in `ring_attention`, for a first prompt; later chunks are plain PyTorch.

    Returns:
        o [B, Hq, L, Dv] in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other, the cache (its dtype too) or those of
            other ranks, or no room in the cache of one rank; on all ranks. After this and every
            other error the cache is as before.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
    }
    with cp.refusing("prefill"):
        resolve_backend_name(backend, cache.k.device)
    rule, place = agree(
        "prefill", cp, cache, (q, k, v), options, lambda: _places(cp, k, cache, lengths)
    )
    if bool((cache.next_position == 0).all()):
        # Nobody sees padding, but a weight of 0 times a NaN would be one.
        q, k, v = (q, k, v) if lengths is None else _without_padding(place.ours, q, k, v)
        o = ring_attention(q, k, v, cp=cp, backend=backend, **options)
        assert isinstance(o, Tensor), "lse was not asked for"
        cache.store(k, v, place.ours)
    else:
        with cache.kept_if_done(), cp.transport.call("prefill") as call:
            call.begin()
            cache.store(k, v, place.ours)
            o = _over_caches(call, cp, q, place.positions, cache, rule, sinks).to(q.dtype)
    cache.next_position += place.counts
    return o


def _places(cp: CPContext, k: Tensor, cache: KVCache, lengths: Tensor | None) -> Places:
    """Raises ValueError for a chunk that the layout cannot cut, and for lengths beyond it."""
    num_tokens = k.shape[2] * cp.size
    at = slot_positions(cp.layout, cp.size, cp.rank, num_tokens).to(k.device)
    counts = torch.full_like(cache.next_position, num_tokens)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in validation.INTEGERS:
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(f"lengths: expected an int32 or int64 tensor or None, got {got}")
        fits = lengths.shape == counts.shape and bool(
            ((lengths >= 0) & (lengths <= num_tokens)).all()
        )
        if not fits:
            raise ValueError(
                f"lengths: expected [{counts.shape[0]}] numbers from 0 to {num_tokens} (the chunk "
                f"of all ranks), got {lengths.tolist()}"
            )
        counts = lengths.to(counts)
    positions = cache.next_position[:, None] + at
    return Places(counts, positions, torch.where(at < counts[:, None], positions, EMPTY))


def _without_padding(ours: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Zeros in the rows of [B, H, L, D] that hold no token; ours: [B, L], `EMPTY` for these."""
    padding = (ours == EMPTY)[:, None, :, None]
    return [x.masked_fill(padding, 0.0) for x in tensors]


def _over_caches(
    call: Call,
    cp: CPContext,
    q: Tensor,
    q_pos: Tensor,
    cache: KVCache,
    rule: Rule,
    sinks: Tensor | None,
) -> Tensor:
    """o, fp32, over the caches of all ranks; they travel once round the ring, the next one while
    the present one is computed. A rank with fewer tokens sends free slots behind them.
    """
    slots = torch.tensor([cache.num_slots], device=q.device)
    rows = max(int(x) for x in cp.transport.all_gather(slots))
    kv, at = _pack(call, cache, rows)
    o, lse = nothing_seen(q, cache.v)
    for move in (*ring_moves(cp.ring_order, cp.rank), None):
        hops = (call.start(kv, move), call.start(at, move))
        merge_(o, lse, *attend(q, q_pos, *_unpack(kv, at, cache, rows), rule))
        for hop in hops:
            hop.wait()
    return merge_all([(o, lse)], sinks)[0]


def _pack(call: Call, cache: KVCache, rows: int) -> tuple[Parcel, Parcel]:
    """Keys and values of the first `rows` slots as one message, and their positions as another."""
    flat = [x[:, :, :rows].reshape(-1) for x in (cache.k, cache.v)]
    kv = call.parcel("kv", (sum(x.numel() for x in flat),), cache.k.dtype, cache.k.device)
    torch.cat(flat, out=kv.payload)
    at = cache.positions[:, :rows]
    parcel = call.parcel("gather", tuple(at.shape), at.dtype, at.device)
    parcel.payload.copy_(at)
    return kv, parcel


def _unpack(kv: Parcel, at: Parcel, cache: KVCache, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_heads, _, k_dim = cache.k.shape
    size = batch * num_heads * rows * k_dim
    k, v = kv.payload[:size], kv.payload[size:]
    front = (batch, num_heads, rows)
    return k.view(*front, k_dim), v.view(*front, -1), at.payload
