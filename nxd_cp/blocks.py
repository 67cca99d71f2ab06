"""Keys and values on their way round the ring.

Does: hold the keys and values that are here, pack those rows that leave, and unpack what came in.
K and V are one message: all of K, then all of V, which may have another head dim. Does not: decide
what moves (`schedule`), move it (`transport/`), or bring gradients home (`gradients.py`).

Note [Rows that are here]
    A move may carry some rows of a block and leave out the rest. Tiles name rows of the owner's
    whole block, so a view of them is found by counting the rows that are here before them.

Letters: B batch, Hkv key/value heads, R rows, D and Dv head dims of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nxd_cp.schedule import Move, Rows, num_rows
from nxd_cp.transport import Call, Hop, Parcel


@dataclass(frozen=True)
class PairShape:
    """Shapes of a tensor of keys [B, Hkv, R, D] and one of values [B, Hkv, R, Dv], for any R."""

    batch: int
    num_heads: int
    k_dim: int
    v_dim: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> PairShape:
        """Of these keys and values."""
        return cls(k.shape[0], k.shape[1], k.shape[3], v.shape[3])

    def parcel(
        self, call: Call, channel: str, rows: int, device: torch.device, dtype: torch.dtype
    ) -> Parcel:
        """A parcel for `rows` rows of keys and values."""
        size = self.batch * self.num_heads * rows * (self.k_dim + self.v_dim)
        return call.parcel(channel, (size,), dtype, device)

    def split(self, payload: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values as views of a message."""
        front = (self.batch, self.num_heads, rows)
        k, v = payload.view(-1).split(
            [torch.Size((*front, dim)).numel() for dim in (self.k_dim, self.v_dim)]
        )
        return k.view(*front, self.k_dim), v.view(*front, self.v_dim)


class KeyBlock:
    """The keys and values that are here: our own at first, then those of the next owner."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self._call, self._shape = call, PairShape.of(k, v)
        self._k, self._v = k, v
        self._held: Rows = (slice(0, k.shape[2]),)
        self._owner = call.transport.rank
        self._parcel: Parcel | None = None  # our own block lies in no message yet
        self._transit: tuple[Hop, Move] | None = None

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Views of these rows, counted in the owner's whole block."""
        first = place(self._held, rows)
        here = slice(first, first + rows.stop - rows.start)
        return self._k[:, :, here], self._v[:, :, here]

    def start(self, move: Move | None) -> None:
        """Begin to send what others need of this block, and to receive the next one."""
        if move is None:
            self._call.count_hop("kv")
            return
        hop = self._call.posted_hop()
        self._transit = (self.post(move) if hop is None else hop), move

    def post(self, move: Move) -> Hop:
        """Start this move of what is here; `wait` is for moves that `start` began."""
        out = None
        if move.to is not None:
            is_packed = self._parcel is not None and move.out == self._held
            out = self._parcel if is_packed else self._pack(move.out)
        into = out
        other_size = num_rows(move.into) != num_rows(move.out)
        if out is None or (move.source is not None and other_size):
            into = self._new_parcel(num_rows(move.into))
        assert into is not None, "a move sends or receives"
        return self._call.start(into if out is None else out, move, into)

    def wait(self) -> None:
        """Block until the move is done; what came in is here now."""
        if self._transit is None:
            return
        (hop, move), self._transit = self._transit, None
        payload = hop.wait()
        here = self._parcel
        if move.source is not None:
            here, self._held = hop.into, move.into
            self._owner = move.brings
            self._k, self._v = self._shape.split(payload, num_rows(self._held))
        done = {self._parcel, hop.parcel} - {None, here}
        self._call.release([parcel for parcel in done if parcel is not None])
        self._parcel = here

    def _pack(self, rows: Rows) -> Parcel:
        parcel = self._new_parcel(num_rows(rows))
        parcel.owner = self._owner
        pieces = [self.rows(piece) for piece in rows]
        targets = self._shape.split(parcel.payload, num_rows(rows))
        for target, sources in zip(targets, zip(*pieces, strict=True), strict=True):
            copy_rows(target, sources)
        return parcel

    def _new_parcel(self, count: int) -> Parcel:
        return self._shape.parcel(self._call, "kv", count, self._k.device, self._k.dtype)


def copy_rows(target: Tensor, pieces: Sequence[Tensor]) -> None:
    """Lay pieces [B, H, R, D] of different R behind each other."""
    first = 0
    for piece in pieces:
        target[:, :, first : first + piece.shape[2]] = piece
        first += piece.shape[2]


def place(held: Rows, rows: slice) -> int:
    """Where `rows` begin among the rows that are here."""
    before = 0
    for piece in held:
        if piece.start <= rows.start and rows.stop <= piece.stop:
            return before + rows.start - piece.start
        before += piece.stop - piece.start
    raise AssertionError(f"rows {rows} are not among those here, {held}")
