"""Ring Attention: two loops over a schedule.

Does: execute one rank's steps of a `Plan`. Keys and values travel in one message, which leaves
before the present rectangle is computed; results are merged in fp32. Does not: choose what to
compute (`schedule.py`), bring gradients of keys and values home (`gradients.py`), move bytes
(`transport/`), compute scores (`backends/`), or check arguments (`validation.py`).

Contracts
    Step 0 is the rank's own diagonal. o and lse are fp32 from the first step to the last.
    A row that has seen nothing has o = 0 and lse = -inf; merging keeps it so, without a NaN.
    The backward recomputes probabilities from the final lse of each row.

Letters: B batch, Hq query heads, Hkv key/value heads, S local rows, D head size.
Source: Ring Attention (arXiv 2310.01889); the merge is the online softmax of arXiv 1805.02867.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp import gradients
from nxd_cp.backends.base import Backend, BlockMask, Documents
from nxd_cp.schedule import Plan, Tile, ring_moves
from nxd_cp.transport import Call, Parcel


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
    document_ids: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's o [B, Hq, S, D] and lse [B, Hq, S], both fp32, over the keys of all ranks.

    document_ids: [B, S] of every rank; a query sees keys of its own document only.
    """
    o = lse = None
    kv = _pack(call, k, v)
    here = kv.payload
    for step in plan.steps[rank]:
        hop = call.start(kv, step.kv)
        for tile in step.tiles:
            k_tile, v_tile = here[:, :, :, tile.k]
            mask = _mask(tile, document_ids, rank, step.owner)
            part = backend.forward(q[:, :, tile.q], k_tile, v_tile, mask=mask, scale=scale)
            o, lse = _merge_rows(o, lse, tile.q, part, like=q)
        here = hop.wait()
    assert o is not None, "every schedule computes something"
    assert lse is not None, "o and lse come together"
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
    document_ids: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's dq [B, Hq, S, D], dk and dv [B, Hkv, S, D], fp32.

    dk and dv lie in a message buffer: copy them before the call ends.
    o and lse are the results of `forward`; o may have been rounded to the dtype of q.
    """
    o, delta = o.float(), _row_sums(do, o)
    dq = None
    kv, grads = _pack(call, k, v), gradients.collect(call, plan, k)
    here = kv.payload
    for step in plan.steps[rank]:
        hop = call.start(kv, step.kv)
        parts = []
        for tile in step.tiles:
            rows = tile.q
            k_tile, v_tile = here[:, :, :, tile.k]
            dq_tile, *dkv_tile = backend.backward(
                do[:, :, rows],
                q[:, :, rows],
                k_tile,
                v_tile,
                o[:, :, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                mask=_mask(tile, document_ids, rank, step.owner),
                scale=scale,
            )
            dq = _add_rows(dq, rows, dq_tile, like=q)
            parts.append((tile.k, dkv_tile))
        grads.add(step, parts)
        here = hop.wait()
    dk, dv = grads.finish()
    assert dq is not None, "every schedule computes something"
    return dq, dk, dv


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


def _merge_rows(
    o: Tensor | None, lse: Tensor | None, rows: slice, part: tuple[Tensor, Tensor], *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The running result with a part for `rows` merged in; a first part for all rows is the result.

    Usually step 0 covers all rows, and taking its result spares memory and a pass over it.
    """
    o_tile, lse_tile = part
    if o is None or lse is None:
        if o_tile.shape == like.shape:
            return o_tile, lse_tile
        o = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        lse = o.new_full(like.shape[:-1], -torch.inf)
    merge_(o[:, :, rows], lse[:, :, rows], o_tile, lse_tile)
    return o, lse


def _add_rows(total: Tensor | None, rows: slice, part: Tensor, *, like: Tensor) -> Tensor:
    """The sum with a part for `rows` added; a first part for all rows is the sum."""
    if total is None:
        if part.shape == like.shape:
            return part
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    total[:, :, rows] += part
    return total


def _pack(call: Call, k: Tensor, v: Tensor) -> Parcel:
    """Our own keys and values as one message, [2, B, Hkv, S, D] in their dtype."""
    parcel = call.parcel("kv", (2, *k.shape), k.dtype, k.device)
    torch.stack((k, v), out=parcel.payload)
    return parcel


def _row_sums(do: Tensor, o: Tensor) -> Tensor:
    """delta = rowsum(do * o), fp32 [B, Hq, S]; head by head, so that no product is held whole."""
    heads = range(o.shape[1])
    return torch.stack([(do[:, h].float() * o[:, h].float()).sum(-1) for h in heads], dim=1)
