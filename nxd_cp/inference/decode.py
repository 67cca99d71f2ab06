"""One or a few new tokens against a cache that is split over the ranks.

Does: store each new token on one rank, let every rank attend to what it holds, and merge the parts
by their log-sum-exp; one gather of o and lse, which is small, and no key ever moves. Does not:
shard queries (every rank has them all).
Source: the merge of parts is the online softmax (arXiv 1805.02867), as in tree attention decoding
(arXiv 2408.04093).

Letters: B batch, Hq query heads, Hkv key/value heads, T new tokens, D and Dv head dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.inference.arguments import Places, agree
from nxd_cp.inference.attend import attend, merge_all
from nxd_cp.inference.cache import EMPTY, KVCache
from nxd_cp.schedule import Window


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: KVCache,
    cp: CPContext,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the T newest tokens of each sequence, which are stored in the cache.

    A collective call: every rank makes it, with equal q, k and v.

    Args:
        q: [B, Hq, T, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv], of all T tokens. They follow
            what the cache holds, each sequence where it ended.
        cache: this rank's part; the token at position p goes to rank p % cp.size.
        cp: the context.
        scale, window, softcap, sinks: as in `ring_attention`; causal.
        return_lse: also return lse [B, Hq, T], fp32.

    Returns:
        o [B, Hq, T, Dv] in q's dtype, equal bit by bit on all ranks.

    Raises:
        ValueError: arguments that do not fit each other, the cache (its dtype too) or those of
            other ranks, or no room in the cache of one rank; on all ranks. After this and every
            other error the cache is as before.
    """
    with cp.refusing("decode"):
        validation.validate_flag("return_lse", return_lse)
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}

    def places() -> Places:
        steps = torch.arange(k.shape[2], device=cache.next_position.device)
        positions = cache.next_position[:, None] + steps
        ours = torch.where(positions % cp.size == cp.rank, positions, EMPTY)
        return Places(torch.full_like(cache.next_position, k.shape[2]), positions, ours)

    rule, place = agree("decode", cp, cache, (q, k, v), options, places)
    with cache.kept_if_done(), cp.transport.call("decode") as call:
        call.begin()
        cache.store(k, v, place.ours)
        cache.next_position += place.counts
        o, lse = attend(q, place.positions, *cache.used(), rule)
        # One tensor, one gather: o with lse as its last column.
        gathered = cp.transport.all_gather(torch.cat([o, lse.unsqueeze(-1)], dim=-1))
    o, lse = merge_all([(one[..., :-1], one[..., -1]) for one in gathered], sinks)
    return (o.to(q.dtype), lse) if return_lse else o.to(q.dtype)
