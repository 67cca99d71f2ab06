"""Ring Attention: two loops over a schedule.

Does: execute one rank's steps of a `Plan`. Keys and values travel in one message, which leaves
before the present rectangle is computed; results are merged in fp32, sinks last. Does not: choose
what to compute (`schedule`), pack keys and values (`blocks.py`), bring their gradients home
(`gradients.py`), move bytes (`transport/`), compute scores (`backends/`), or check arguments
(`validation.py`).

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

import torch
from torch import Tensor

from nxd_cp import gradients
from nxd_cp.backends.base import Backend, BlockMask, Documents
from nxd_cp.blocks import KeyBlock
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
) -> tuple[Tensor, Tensor]:
    """This rank's o [B, Hq, S, Dv] and lse [B, Hq, S], both fp32, over the keys of all ranks.

    sinks: [Hq]. document_ids: [B, S] of every rank; a query sees keys of its own document only.
    """
    result = None
    block = KeyBlock(call, k, v)
    for step in plan.steps[rank]:
        block.start(step.kv)
        for tile in step.tiles:
            mask = _mask(tile, document_ids, rank, step.owner)
            part = backend.forward(
                q[:, :, tile.q], *block.rows(tile.k), mask=mask, scale=scale, softcap=softcap
            )
            result = _merge_rows(result, tile.q, part, q.shape[2])
        block.wait()
    o, lse = _empty_result(q, v) if result is None else result
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
    o, delta = o.float(), _row_sums(do, o)
    dq = None
    block, grads = KeyBlock(call, k, v), gradients.collect(call, plan, k, v)
    for step in plan.steps[rank]:
        block.start(step.kv)
        parts: list[gradients.Part] = []
        for tile in step.tiles:
            rows = tile.q
            dq_tile, dk_tile, dv_tile = backend.backward(
                do[:, :, rows],
                q[:, :, rows],
                *block.rows(tile.k),
                o[:, :, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                mask=_mask(tile, document_ids, rank, step.owner),
                scale=scale,
                softcap=softcap,
            )
            dq = _add_rows(dq, rows, dq_tile, like=q)
            parts.append((tile.k, (dk_tile, dv_tile)))
        grads.add(step, parts)
        block.wait()
    dk, dv = grads.finish()
    dq = torch.zeros_like(q, dtype=torch.float32) if dq is None else dq
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


def merge_(o: Tensor, lse: Tensor, o_tile: Tensor, lse_tile: Tensor) -> None:
    """Add a rectangle to the running result, in place; all fp32.

    With weight w = sigmoid(lse_tile - lse): o moves to o + w (o_tile - o), lse to their logaddexp.
    Where the rectangle shows nothing the weight is 0, also where -inf + inf would be NaN.
    """
    weight = torch.sigmoid(lse_tile - lse).masked_fill_(lse_tile == -torch.inf, 0.0)
    o.lerp_(o_tile, weight.unsqueeze(-1))
    torch.logaddexp(lse, lse_tile, out=lse)


Result = tuple[Tensor, Tensor]


def _merge_rows(result: Result | None, rows: slice, part: Result, num_rows: int) -> Result:
    """The running result with a part for `rows` merged in; a first part for all rows is the result.

    Usually step 0 covers all rows, and taking its result spares memory and a pass over it.
    """
    o_tile, lse_tile = part
    if result is None:
        if o_tile.shape[2] == num_rows:
            return part
        result = _empty_rows(o_tile, num_rows)
    o, lse = result
    merge_(o[:, :, rows], lse[:, :, rows], o_tile, lse_tile)
    return result


def _empty_result(q: Tensor, v: Tensor) -> Result:
    """What a rank that holds nothing but padding returns."""
    return _empty_rows(q.new_empty((*q.shape[:2], 0, v.shape[-1])), q.shape[2])


def _empty_rows(like: Tensor, num_rows: int) -> Result:
    """o = 0 and lse = -inf for so many rows of [B, Hq, any, Dv]."""
    B, H, _, D = like.shape
    o = torch.zeros((B, H, num_rows, D), dtype=torch.float32, device=like.device)
    return o, o.new_full((B, H, num_rows), -torch.inf)


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


def _add_rows(total: Tensor | None, rows: slice, part: Tensor, *, like: Tensor) -> Tensor:
    """The sum with a part for `rows` added; a first part for all rows is the sum."""
    if total is None:
        if part.shape == like.shape:
            return part
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    total[:, :, rows] += part
    return total


def _row_sums(do: Tensor, o: Tensor) -> Tensor:
    """delta = rowsum(do * o), fp32 [B, Hq, S]; head by head, so that no product is held whole."""
    heads = range(o.shape[1])
    return torch.stack([(do[:, h].float() * o[:, h].float()).sum(-1) for h in heads], dim=1)
