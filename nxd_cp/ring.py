"""Ring Attention: two loops over a schedule.

Does: execute one rank's steps of a `Plan`. Keys and values travel in one message, which leaves
before the present rectangle is computed; results are merged in fp32; in the backward the gradients
of keys and values follow them and come home. Does not: choose what to compute (`schedule.py`), move
bytes (`transport/`), compute scores (`backends/`), or check arguments (`validation.py`).

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

from nxd_cp.backends.base import Backend
from nxd_cp.schedule import Plan, Tile
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
) -> tuple[Tensor, Tensor]:
    """This rank's o [B, Hq, S, D] and lse [B, Hq, S], both fp32, over the keys of all ranks."""
    o = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
    kv = _pack(k, v, rank)
    here = kv.payload
    for step in plan.steps[rank]:
        hop = call.start(kv, step.kv)
        for tile in step.tiles:
            k_tile, v_tile = here[:, :, :, tile.k]
            o_tile, lse_tile = backend.forward(
                q[:, :, tile.q], k_tile, v_tile, mask=tile.mask, scale=scale
            )
            merge_(o[:, :, tile.q], lse[:, :, tile.q], o_tile, lse_tile)
        here = hop.wait()
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
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's dq [B, Hq, S, D], dk and dv [B, Hkv, S, D], fp32.

    o and lse are the results of `forward`; o may have been rounded to the dtype of q.
    """
    o = o.float()
    delta = (do.float() * o).sum(-1)
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    kv, grads = _pack(k, v, rank), _zero_gradients(k, rank)
    here = kv.payload
    grads_hop = call.start(grads, None)
    for step in plan.steps[rank]:
        hop = call.start(kv, step.kv)
        parts = []
        for tile in step.tiles:
            rows = tile.q
            k_tile, v_tile = here[:, :, :, tile.k]
            dq_tile, dk_tile, dv_tile = backend.backward(
                do[:, :, rows],
                q[:, :, rows],
                k_tile,
                v_tile,
                o[:, :, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                mask=tile.mask,
                scale=scale,
            )
            dq[:, :, rows] += dq_tile
            parts.append((tile, dk_tile, dv_tile))
        _add(grads_hop.wait(), parts)
        grads_hop = call.start(grads, step.grad)
        here = hop.wait()
    dk, dv = grads_hop.wait()  # ours, come home: the header of the last message says so
    return dq, dk, dv


def merge_(o: Tensor, lse: Tensor, o_tile: Tensor, lse_tile: Tensor) -> None:
    """Add a rectangle to the running result, in place; all fp32.

    With weight w = sigmoid(lse_tile - lse): o moves to o + w (o_tile - o), lse to their logaddexp.
    Where the rectangle shows nothing the weight is 0, also where -inf + inf would be NaN.
    """
    weight = torch.sigmoid(lse_tile - lse).masked_fill_(lse_tile == -torch.inf, 0.0)
    o.lerp_(o_tile, weight.unsqueeze(-1))
    torch.logaddexp(lse, lse_tile, out=lse)


def _pack(k: Tensor, v: Tensor, rank: int) -> Parcel:
    """Our own keys and values as one message, [2, B, Hkv, S, D] in their dtype."""
    parcel = Parcel("kv", (2, *k.shape), k.dtype, k.device, owner=rank)
    torch.stack((k, v), out=parcel.payload)
    return parcel


def _zero_gradients(k: Tensor, rank: int) -> Parcel:
    parcel = Parcel("grad", (2, *k.shape), torch.float32, k.device, owner=rank)
    parcel.payload.zero_()
    return parcel


def _add(grads: Tensor, parts: list[tuple[Tile, Tensor, Tensor]]) -> None:
    """Add this step's rectangles to the visitor's gradients [2, B, Hkv, S, D]."""
    for tile, dk, dv in parts:
        grads[0, :, :, tile.k] += dk
        grads[1, :, :, tile.k] += dv
