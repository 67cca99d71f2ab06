"""Ring Attention: two loops over a schedule.

Does: execute one rank's steps of a `Plan`. Keys and values travel in one message, which leaves
before the present rectangle is computed; results are merged in fp32, sinks last. Does not: choose
what to compute (`schedule`), pack keys and values (`blocks.py`), hold the running result
(`running.py`), bring gradients of keys home (`gradients.py`), move bytes (`transport/`), compute
scores and merge them (`backends/`), or check arguments (`validation.py`).

Contracts
    Step 0 is the rank's own diagonal. o and lse are fp32 from the first step to the last.
    A row that has seen nothing has o = 0 and lse = -inf; merging keeps it so, without a NaN.
    The backward recomputes probabilities from the final lse of each row.
    A sink is one more score in each row of its head, of a key whose value is zero. So it is one
    more part to merge, with o = 0 and lse = sink, and its gradient is -sum(p_sink * delta).
    Padded rows are in no rectangle: o = 0, lse = -inf, no gradient, whatever lies there.

Letters: B batch, Hq query heads, Hkv key/value heads, S local rows, D and Dv head dims.
Source: Ring Attention (arXiv 2310.01889); the merge is the online softmax of arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nxd_cp import gradients
from nxd_cp.backends.base import (
    Backend,
    BlockMask,
    Carry,
    Documents,
    Pair,
    QueryRows,
    Scores,
)
from nxd_cp.blocks import KeyBlock
from nxd_cp.running import Running
from nxd_cp.schedule import Plan, Tile, ring_moves
from nxd_cp.transport import Call


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan,
    rank: int,
    backend: Backend,
    call: Call,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    document_ids: list[Tensor] | None = None,
    memory: Pair | None = None,
) -> Pair:
    """This rank's o [B, Hq, S, Dv] and lse [B, Hq, S], both fp32, over the keys of all ranks.

    sinks: [Hq]. document_ids: [B, S] of every rank; a query sees keys of its own document only.
    memory: unspecified; where a backend that adds in place makes the result, which is then this
        very pair.
    """
    all_rows = slice(0, q.shape[2])
    memory = None if backend.carries else memory
    nothing = _nothing_seen(q, v, backend, memory)
    so_far = Running(q.shape[2], nothing, in_place=not backend.carries)
    block = KeyBlock(call, k, v)
    for step in plan.steps[rank]:
        block.start(step.kv)
        for tile in step.tiles:
            keys, whole = block.rows(tile.k), _mask(tile, document_ids, rank, step.owner)
            for rows, mask in so_far.cut(tile.q, whole):
                scores, carry = Scores(mask, scale, softcap), so_far.take(rows)
                out = memory if rows == all_rows else None
                so_far.put(rows, backend.forward(q[:, :, rows], *keys, scores, carry, out))
        block.wait()
    o, lse, *_ = so_far.finish()
    if sinks is not None:
        _merge_sinks_(o, lse, sinks, slice(0, plan.local_tokens[rank]))
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    plan: Plan,
    rank: int,
    backend: Backend,
    call: Call,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    document_ids: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """This rank's dq [B, Hq, S, D], dk and dv [B, Hkv, S, D or Dv] and dsinks [Hq], all fp32.

    dk and dv lie in a message buffer: copy them before the call ends. dsinks, the part of this
    rank's rows, is None without sinks.
    o and lse are the results of `forward`; o may have been rounded to the dtype of q.
    """
    delta = backend.row_delta(do, o)
    saved = QueryRows(do, q, o.float(), lse, delta)
    so_far = Running(q.shape[2], _no_gradient(q), in_place=not backend.carries)
    block, grads = KeyBlock(call, k, v), gradients.collect(call, plan, k, v)
    for step in plan.steps[rank]:
        block.start(step.kv)
        parts: list[gradients.Part] = []
        for tile in step.tiles:
            keys, whole = block.rows(tile.k), _mask(tile, document_ids, rank, step.owner)
            for rows, mask in so_far.cut(tile.q, whole):
                scores, carry = Scores(mask, scale, softcap), so_far.take(rows)
                before = None if carry is None else carry[0]
                dq, dk, dv = backend.backward(saved.at(rows), *keys, scores, before)
                so_far.put(rows, (dq,))
                parts.append((tile.k, (dk, dv)))
        grads.add(step, parts)
        block.wait()
    dk, dv = grads.finish()
    (dq,) = so_far.finish()
    dsinks = None
    if sinks is not None:
        dsinks = _sink_gradients(sinks, lse, delta, slice(0, plan.local_tokens[rank]))
    return dq, dk, dv, dsinks


def _mask(tile: Tile, document_ids: list[Tensor] | None, rank: int, owner: int) -> BlockMask:
    """The mask of a tile, with the documents of its queries and keys where there are any."""
    if document_ids is None:
        return tile.mask
    return Documents(tile.mask, document_ids[rank][:, tile.q], document_ids[owner][:, tile.k])


def gather(call: Call, local: Tensor, plan: Plan, rank: int) -> list[Tensor]:
    """Everyone's `local`, in rank order; small, and once per call."""
    parcel = call.parcel("gather", tuple(local.shape), local.dtype, local.device)
    parcel.payload.copy_(local)
    found = {rank: local}
    for move in ring_moves(plan.ring_order, rank):
        found[move.brings] = call.start(parcel, move).wait().clone()
    return [found[owner] for owner in sorted(found)]


def _nothing_seen(
    q: Tensor, v: Tensor, backend: Backend, memory: Pair | None
) -> Callable[[int], Carry]:
    """Makes o = 0 and lse = -inf for so many rows; all of them are made in `memory`, if given."""

    def make(num_rows: int) -> Carry:
        if memory is not None and num_rows == q.shape[2]:
            return memory[0].zero_(), memory[1].fill_(-torch.inf)
        shape = (*q.shape[:2], num_rows)
        o = torch.zeros((*shape, v.shape[-1]), dtype=torch.float32, device=q.device)
        return backend.as_carry(o, o.new_full(shape, -torch.inf))

    return make


def _no_gradient(q: Tensor) -> Callable[[int], tuple[Tensor]]:
    """Makes dq = 0 for so many rows."""
    B, H, _, D = q.shape
    return lambda rows: (torch.zeros((B, H, rows, D), dtype=torch.float32, device=q.device),)


def _merge_sinks_(o: Tensor, lse: Tensor, sinks: Tensor, rows: slice) -> None:
    """Add each head's sink to its rows, in place."""
    o, lse = o[:, :, rows], lse[:, :, rows]
    sink = sinks.float().view(1, -1, 1)
    o *= torch.sigmoid(lse - sink).masked_fill_(lse == -torch.inf, 0.0).unsqueeze(-1)
    torch.logaddexp(lse, sink, out=lse)


def _sink_gradients(sinks: Tensor, lse: Tensor, delta: Tensor, rows: slice) -> Tensor:
    lse, delta = lse[:, :, rows], delta[:, :, rows]
    weight = torch.exp(sinks.float().view(1, -1, 1) - lse).masked_fill_(lse == -torch.inf, 0.0)
    return -(weight * delta).sum((0, 2))
