"""`nki_ring_attn_func` with NxD's signature, layout and results, over this package's ring.

Does: take the ten arguments of `neuronx_distributed.kernels.ring_attention_kernel`, in its order.
Does not: touch NxD's kernel, repeat key/value heads, or put the rank into the graph.

What differs: any length that `ring_attention` takes (NxD: multiples of 1024); fewer key/value than
query heads, in the backward too; softmax and sums always in fp32, so `mixed_precision=False` gives
what True gives; no dropout; inputs are not cast by XLA_USE_BF16 or XLA_DOWNCAST_BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd.state import check_ring, shared_context


def nki_ring_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank_id: int,
    src_tgt_pairs: Sequence[Sequence[int]],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    mixed_precision: bool = True,
    seed: Tensor | None = None,
    *,
    cp: CPContext | None = None,
    backend: str = "auto",
) -> Tensor:
    """Ring attention over contiguous chunks, with NxD's arguments.

    q: [B, Hq, S, D]; k, v: [B, Hkv, S, D], repeated or not (Hkv divides Hq), this rank's chunk.
    rank_id: global rank; src_tgt_pairs: the ring as (source, target) global ranks. Both are checked
    against the context and not used otherwise: the rank is data, one graph serves all.
    softmax_scale: default D ** -0.5. mixed_precision, seed: accepted; see the head of this file.
    cp: the context; default the one of NxD's groups, contiguous. backend: as in `ring_attention`.

    Returns [B, Hq, S, D] in q's dtype (what NxD's kernel returns; its docstring says otherwise).
    Raises ValueError for dropout, for a ring that is not the context's, and as `ring_attention`.
    """
    context = shared_context("contiguous") if cp is None else cp
    with context.refusing("forward"):
        check_ring(context, rank_id, src_tgt_pairs)
    o: Any = ring_attention(
        q,
        k,
        v,
        cp=context,
        causal=causal,
        scale=softmax_scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    return o
