"""Strategies: how keys, values or heads move so that every rank sees all it must.

Does: run a forward or a backward by the strategy of a context. Does not: check arguments, agree
with other ranks (`ops.py`), or compute (`ring.py`, which every strategy uses).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nxd_cp import ring
from nxd_cp.schedule import Plan
from nxd_cp.strategies import cost
from nxd_cp.strategies.cost import Shape
from nxd_cp.strategies.gather import rounds_of
from nxd_cp.strategies.heads import join_rows, to_heads, to_tokens
from nxd_cp.strategies.plan import STRATEGIES, Strategy, StrategyPlan, plan_strategy
from nxd_cp.transport import Call

__all__ = [
    "STRATEGIES",
    "Strategy",
    "StrategyPlan",
    "backward",
    "forward",
    "plan_for",
    "plan_strategy",
    "rows_first_like",
]


def plan_for(strategy: Strategy, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> StrategyPlan:
    """A ring plan carried out by `strategy`, which may be "auto", for tensors of these shapes."""
    batch, num_heads, _, head_dim = q.shape
    v_dim = None if v.shape[-1] == head_dim else v.shape[-1]
    shape = Shape(batch, num_heads, k.shape[1], head_dim, q.element_size(), v_dim)
    return cost.plan_for(plan, strategy, shape)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    work: StrategyPlan,
    rank: int,
    call: Call,
    sinks: Tensor | None = None,
    document_ids: list[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As `ring.forward`, whose other keywords are `options`."""
    options |= {"plan": work.plan, "rank": rank}
    if work.groups is not None:
        group = work.groups[rank]
        parts = to_heads(call, group, [q], [k, v])
        ids = _join_ids(work, document_ids)
        own = _own_sinks(work, rank, sinks)
        o, lse = ring.forward(*parts, call=call, sinks=own, document_ids=ids, **options)
        # The all-to-all moves what is returned, so o is rounded here, once.
        lse, o = to_tokens(call, group, [lse, o.to(q.dtype)], [])
        return o, lse
    if len(work.rounds) == 1 and work.strategy.name == "ring":
        return ring.forward(q, k, v, call=call, sinks=sinks, document_ids=document_ids, **options)
    o = rows_first_like(q, v.shape[-1])  # filled round by round, rounded once; never held twice
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    for mine, heads, posted in rounds_of(call, work, rank, q, k, v):
        place = o[:, mine], lse[:, mine]
        found = ring.forward(
            q[:, mine],
            k[:, heads],
            v[:, heads],
            call=posted,
            sinks=None if sinks is None else sinks[mine],
            document_ids=document_ids,
            memory=place if o.dtype == torch.float32 else None,
            **options,
        )
        if found[0] is not place[0]:
            o[:, mine], lse[:, mine] = found
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    work: StrategyPlan,
    rank: int,
    call: Call,
    sinks: Tensor | None = None,
    document_ids: list[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `ring.backward`, whose other keywords are `options`."""
    options |= {"plan": work.plan, "rank": rank}
    if work.groups is not None:
        group = work.groups[rank]
        lse, do, q, o, k, v = to_heads(call, group, [lse, do, q, o], [k, v])
        ids = _join_ids(work, document_ids)
        own = _own_sinks(work, rank, sinks)
        *grads, dsinks = ring.backward(
            do, q, k, v, o, lse, call=call, sinks=own, document_ids=ids, **options
        )
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        dq, dk, dv = to_tokens(call, group, [dq], [dk, dv])
        return dq, dk, dv, _all_sinks(work, rank, dsinks)
    options |= {"document_ids": document_ids}
    if len(work.rounds) == 1 and work.strategy.name == "ring":
        return ring.backward(do, q, k, v, o, lse, call=call, sinks=sinks, **options)
    dq, dk, dv = (rows_first_like(x) for x in (q, k, v))
    by_sink: list[Tensor] = []
    for mine, heads, posted in rounds_of(call, work, rank, q, k, v):
        *found, dsinks = ring.backward(
            do[:, mine],
            q[:, mine],
            k[:, heads],
            v[:, heads],
            o[:, mine],
            lse[:, mine],
            call=posted,
            sinks=None if sinks is None else sinks[mine],
            **options,
        )
        # They may lie in a message buffer, which the next round writes, so they are copied here.
        for whole, part, its in zip((dq, dk, dv), found, (mine, heads, heads), strict=True):
            whole[:, its] = part
        by_sink += [] if dsinks is None else [dsinks]
    return dq, dk, dv, None if sinks is None else torch.cat(by_sink)


def rows_first_like(x: Tensor, dim: int | None = None) -> Tensor:
    """Unspecified [B, H, S, dim] in the dtype of x [B, H, S, D], in memory [B, S, H, dim].

    dim: D, if None.
    """
    B, H, S, D = x.shape
    return x.new_empty(B, S, H, D if dim is None else dim).transpose(1, 2)


def _own_sinks(work: StrategyPlan, rank: int, sinks: Tensor | None) -> Tensor | None:
    """The sinks of the heads that this rank computes."""
    if sinks is None or work.groups is None:
        return sinks
    return sinks.chunk(work.ways)[work.groups[rank].index]


def _all_sinks(work: StrategyPlan, rank: int, dsinks: Tensor | None) -> Tensor | None:
    """Their gradients, with zeros for the heads of others: summed over ranks they are all."""
    if dsinks is None or work.groups is None:
        return dsinks
    whole = dsinks.new_zeros(work.ways, dsinks.shape[0])
    whole[work.groups[rank].index] = dsinks
    return whole.flatten()


def _join_ids(work: StrategyPlan, document_ids: list[Tensor] | None) -> list[Tensor] | None:
    if document_ids is None or work.groups is None:
        return None
    return [join_rows(group, document_ids) for group in work.groups]
