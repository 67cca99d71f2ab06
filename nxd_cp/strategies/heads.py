"""The all-to-all of the "heads" strategy: tokens of some ranks for all heads, and back.

Does: exchange [B, H, L, ...] of u ranks for [B, H / u, u L, ...] and the reverse, several tensors
in one message per pair of ranks, all messages under way at once. Does not: compute attention.

Letters: B batch, H heads, L local tokens, u ranks of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.schedule import Move
from nxd_cp.strategies.routes import HeadGroup, Pieces
from nxd_cp.transport import Call


def to_heads(
    call: Call, group: HeadGroup, by_query: list[Tensor], by_key: list[Tensor]
) -> list[Tensor]:
    """Each [B, H, L, ...] becomes [B, H / u, u L, ...]: our part of the heads, the group's tokens.

    by_query, by_key: tensors with one row per query, and per key; returned in this order. Widest
    dtype first, so that every part of a message is aligned.
    """
    tensors = [*by_query, *by_key]
    pieces = [x.chunk(group.ways, dim=1) for x in tensors]
    incoming = _exchange(call, group, [list(to) for to in zip(*pieces, strict=True)])
    whole = []
    for index, (x, rows) in enumerate(_with_rows(group, by_query, by_key)):
        batch, num_heads, local_len, *rest = x.shape
        joined = x.new_empty(batch, num_heads // group.ways, group.ways * local_len, *rest)
        for member, places in enumerate(rows):
            for local, there in places:
                joined[:, :, there] = incoming[member][index][:, :, local]
        whole.append(joined)
    return whole


def to_tokens(
    call: Call, group: HeadGroup, by_query: list[Tensor], by_key: list[Tensor]
) -> list[Tensor]:
    """Each [B, H / u, u L, ...] becomes [B, H, L, ...]: the reverse of `to_heads`."""
    given = _with_rows(group, by_query, by_key)
    outgoing = [
        [torch.cat([x[:, :, there] for _, there in rows[member]], dim=2) for x, rows in given]
        for member in range(group.ways)
    ]
    incoming = _exchange(call, group, outgoing)
    return [torch.cat([one[i] for one in incoming], dim=1) for i in range(len(given))]


def _with_rows(
    group: HeadGroup, by_query: list[Tensor], by_key: list[Tensor]
) -> list[tuple[Tensor, tuple[Pieces, ...]]]:
    """Each tensor, and where the rows of each member belong in it."""
    return [(x, group.rows) for x in by_query] + [(x, group.key_rows) for x in by_key]


def join_rows(group: HeadGroup, by_rank: list[Tensor]) -> Tensor:
    """[B, L] of every rank become [B, u L] of the group."""
    parts = [by_rank[rank] for rank in group.members]
    joined = parts[0].new_empty(parts[0].shape[0], group.ways * parts[0].shape[1])
    for part, rows in zip(parts, group.rows, strict=True):
        for local, there in rows:
            joined[:, there] = part[:, local]
    return joined


def _exchange(call: Call, group: HeadGroup, outgoing: list[list[Tensor]]) -> list[list[Tensor]]:
    """outgoing[i] goes to member i; returns what each member sent here, in the same shapes."""
    mine = outgoing[group.index]
    num_bytes = sum(x.nbytes for x in mine)
    under_way = []
    for distance in range(1, group.ways):
        to = (group.index + distance) % group.ways
        source = (group.index - distance) % group.ways
        parcel = call.parcel("heads", (num_bytes,), torch.uint8, mine[0].device)
        for view, x in zip(_views(parcel.payload, mine), outgoing[to], strict=True):
            view.copy_(x)
        move = Move(group.members[to], group.members[source], brings=group.members[source])
        under_way.append((source, call.start(parcel, move)))
    incoming = {group.index: mine}
    for source, hop in under_way:
        incoming[source] = _views(hop.wait(), mine)
    return [incoming[member] for member in range(group.ways)]


def _views(payload: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The parts of a message, shaped and typed as `like`."""
    views, start = [], 0
    for x in like:
        views.append(payload[start : start + x.nbytes].view(x.dtype).view(x.shape))
        start += x.nbytes
    return views
