"""What a backend is: attention over one rectangle of scores, forward and backward.

Does: name the contract that the ring relies on. Does not: hold the running result (`running.py`),
talk to other ranks, or know sinks (the ring merges them once, after the last rectangle).

    s = scale * q k^T, then with a softcap s = softcap * tanh(s / softcap), then the mask.

Letters: B batch, Hq query heads, Hkv key/value heads (Hkv divides Hq), Sq/Skv rows, D head dim of
queries and keys, Dv of values.
Source: FlashAttention-2 (arXiv 2307.08691) for the statistics that pass from forward to backward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from nxd_cp.schedule import Mask, Plan


@dataclass(frozen=True)
class Documents:
    """A rectangle in which a query sees, of what `mask` shows, the keys of its own document.

    q_ids: [B, Sq], k_ids: [B, Skv], integers, equal within a document; B may be 1 for all rows.
    """

    mask: Mask
    q_ids: Tensor
    k_ids: Tensor


BlockMask = Mask | Documents
Pair = tuple[Tensor, Tensor]  # o and lse
Carry = tuple[Tensor, ...]  # o, lse and what a backend adds; of query rows, which are dim 2


@dataclass(frozen=True)
class Scores:
    """What becomes of the q k^T of one rectangle."""

    mask: BlockMask
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class QueryRows:
    """What a backward reads of its query rows.

    q: [B, Hq, Sq, D]; do, o: [B, Hq, Sq, Dv]; lse, delta: [B, Hq, Sq] fp32. o (fp32), lse and
    delta = rowsum(do * o) belong to the whole row, over all keys of all ranks and the sink.
    """

    do: Tensor
    q: Tensor
    o: Tensor
    lse: Tensor
    delta: Tensor

    def at(self, rows: slice) -> QueryRows:
        """Views of some of the rows."""
        return QueryRows(*(getattr(self, field.name)[:, :, rows] for field in fields(self)))


class Backend(Protocol):
    """Stateless and safe to call from several threads.

    carries: how results of earlier rectangles become part of this one. True: they are read once
    and the sums are new tensors, written once. False: the sums are made in place, in a pass of
    their own, and what is returned is the carry.
    """

    name: str
    carries: bool

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        carry: Carry | None = None,
        out: Pair | None = None,
    ) -> Carry:
        """Attention over one rectangle, and over what was seen before it.

        q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D]; v: [B, Hkv, Skv, Dv], any supported dtype, strided
        views allowed; query head h reads key head h // (Hq // Hkv), which is never repeated in
        memory. carry: of these rows over other keys, as returned. out: where, without a carry, a
        backend that adds in place makes the result; unspecified before.
        Returns o [B, Hq, Sq, Dv] fp32, normalised, lse [B, Hq, Sq] fp32, natural log, scale
        included, and after them what else the backend carries; see `as_carry`.
        A row that sees nothing has o = 0 and lse = -inf. The mask is one of the three names (two of
        them square), or a `Bounded` band, or either within `Documents`, as far as `validate` let
        them pass.
        """
        ...

    def as_carry(self, o: Tensor, lse: Tensor) -> Carry:
        """A finished (o, lse), as of rows that saw nothing, in the form that `forward` returns."""
        ...

    def backward(
        self, rows: QueryRows, k: Tensor, v: Tensor, scores: Scores, carry: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial gradients of this rectangle, dq added to `carry`, that of earlier ones.

        Returns dq [B, Hq, Sq, D], dk [B, Hkv, Skv, D] and dv [B, Hkv, Skv, Dv], fp32; rows with
        lse = -inf add zero.
        """
        ...

    def row_delta(self, do: Tensor, o: Tensor) -> Tensor:
        """rowsum(do * o) of [B, Hq, S, Dv] each, summed in fp32: [B, Hq, S] fp32."""
        ...

    def validate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan,
        rank: int,
        softcap: float | None = None,
        documents: bool = False,
    ) -> None:
        """Raise ValueError, before any communication, for what this backend cannot compute.

        q, k, v: this rank's tensors. `plan.tiles(rank)` are the rectangles that may be asked for,
        each within `Documents` where `documents` is True.
        """
        ...
