"""The plan itself: steps, moves, what they cost, and a table to read.

Does: hold integers and slices, count messages, bytes and pairs. Does not: decide anything
(`rings.py` does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nxd_cp.schedule.masks import Tile

GradientRoute = Literal["travel", "direct"]
Rows = tuple[slice, ...]  # local rows of keys: ascending, apart

HEADER_BYTES = 64  # every message starts with its sequence numbers
GRADIENT_ITEMSIZE = 4  # partial gradients of keys and values travel in fp32


@dataclass(frozen=True)
class Move:
    """One exchange: what is here goes to group rank `to`, what comes in is from `source`.

    Either may be None, and then nothing is sent or nothing comes in. brings: the group rank that
    owns what comes in. out: key rows (of the owner of what is here) that leave; into: key rows (of
    the owner of what comes in) that come in.
    """

    to: int | None
    source: int | None
    brings: int
    out: Rows = ()
    into: Rows = ()


@dataclass(frozen=True)
class Step:
    """What one rank does in one turn of the ring.

    owner: group rank whose keys and values are here. tiles: rectangles to compute, maybe none.
    kv: the move of keys and values during this step, None on the last. grad: the move of the
    visitor's gradients at the end of this step in the backward, None when the ring has one rank.
    On the route "travel" they go on with the keys (the last move brings our own home); on the route
    "direct" they go to their owner, and what comes in are gradients of our own keys.
    """

    index: int
    owner: int
    tiles: tuple[Tile, ...]
    kv: Move | None
    grad: Move | None

    @property
    def num_pairs(self) -> int:
        """Number of visible (query, key) pairs of this step."""
        return sum(tile.num_pairs for tile in self.tiles)


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes that one rank sends in one call, headers included."""

    forward_messages: int
    forward_bytes: int
    backward_messages: int
    backward_bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole schedule. `steps[rank][i]` is step i of group rank `rank`; slices are local.

    Plans can be keys of a cache: they hash without their steps, and compare with them.

    seq_len, kv_len: slots of the queries and of the keys of the whole sequence. num_tokens,
    num_kv_tokens: how many of them hold a token; the rest is padding at the end, which no tile
    touches. left, right: keys that a query sees before and after its place, None is all.
    local_tokens: by rank, how many of its query slots, the first ones, hold a token.
    """

    layout: str
    size: int
    seq_len: int
    kv_len: int
    num_tokens: int
    num_kv_tokens: int
    left: int | None
    right: int | None
    ring_order: tuple[int, ...]
    steps: tuple[tuple[Step, ...], ...] = field(hash=False)
    gradient_route: GradientRoute = "travel"
    local_tokens: tuple[int, ...] = ()

    @property
    def causal(self) -> bool:
        """No query sees a key after its place."""
        return self.right == 0

    @property
    def window(self) -> int | tuple[int | None, int | None] | None:
        """As `make_plan` takes it: a number of keys where causal, (left, right) where not."""
        if self.causal:
            return None if self.left is None else self.left + 1
        return None if (self.left, self.right) == (None, None) else (self.left, self.right)

    @property
    def num_steps(self) -> int:
        """Number of steps, equal on all ranks; fewer than ranks when the mask spares the rest."""
        return len(self.steps[0])

    @property
    def local_len(self) -> int:
        """Number of query slots that each rank holds."""
        return self.seq_len // self.size

    @property
    def local_kv_len(self) -> int:
        """Number of key slots that each rank holds."""
        return self.kv_len // self.size

    @cached_property
    def longest_hop(self) -> int:
        """Key rows of the largest message that any rank sends; 0 when nothing travels."""
        moves = (step.kv for steps in self.steps for step in steps if step.kv is not None)
        return max((num_rows(move.out) for move in moves), default=0)

    def tiles(self, rank: int) -> tuple[Tile, ...]:
        """All rectangles that `rank` computes, in order."""
        return tuple(tile for step in self.steps[rank] for tile in step.tiles)

    def balance(self) -> tuple[float, ...]:
        """Per step: the busiest rank's pairs over the mean; 1.0 is perfect."""
        ratios = []
        for index in range(self.num_steps):
            pairs = [steps[index].num_pairs for steps in self.steps]
            ratios.append(max(pairs) * self.size / sum(pairs) if sum(pairs) else 1.0)
        return tuple(ratios)

    def traffic(
        self,
        rank: int,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
        v_head_dim: int | None = None,
    ) -> Traffic:
        """What `rank` sends in one forward and one backward.

        itemsize: bytes per element of keys and values. Gradients travel in fp32. v_head_dim: head
        dim of the values where it differs. The agreement check before a call is not counted here
        (see `nxd_cp.transport.agreement`).
        """
        per_row = batch * num_kv_heads * (head_dim + (v_head_dim or head_dim))
        kv = [per_row * itemsize * num_rows(move.out) for move in self._sent(rank, "kv")]
        grad = [per_row * GRADIENT_ITEMSIZE * num_rows(m.out) for m in self._sent(rank, "grad")]
        return Traffic(
            forward_messages=len(kv),
            forward_bytes=sum(kv) + len(kv) * HEADER_BYTES,
            backward_messages=len(kv) + len(grad),
            backward_bytes=sum(kv) + sum(grad) + (len(kv) + len(grad)) * HEADER_BYTES,
        )

    def _sent(self, rank: int, channel: Literal["kv", "grad"]) -> list[Move]:
        moves = (step.kv if channel == "kv" else step.grad for step in self.steps[rank])
        return [move for move in moves if move is not None and move.to is not None]

    def table(self) -> str:
        """The plan as text: one line per rank and step, then the balance of each step."""
        lines = [
            f"{self.layout}, {self.size} ranks, {self._lengths()}, {self._kind()}, "
            f"ring {' -> '.join(map(str, self.ring_order))}",
            f"{'rank':>4}  {'step':>4}  {'kv of':>5}  {'sends to':>8}  {'pairs':>10}  tiles",
        ]
        for rank, steps in enumerate(self.steps):
            for step in steps:
                to = "-" if step.kv is None or step.kv.to is None else str(step.kv.to)
                tiles = ", ".join(map(str, step.tiles)) or "nothing"
                lines.append(
                    f"{rank:>4}  {step.index:>4}  {step.owner:>5}  {to:>8}"
                    f"  {step.num_pairs:>10}  {tiles}"
                )
        lines.append(
            "busiest rank / mean, per step: " + "  ".join(f"{r:.3f}" for r in self.balance())
        )
        return "\n".join(lines)

    def _lengths(self) -> str:
        text = f"{self.num_tokens} tokens ({self.local_len} per rank)"
        if (self.num_kv_tokens, self.kv_len) != (self.num_tokens, self.seq_len):
            text += f" x {self.num_kv_tokens} keys ({self.local_kv_len} per rank)"
        return text

    def _kind(self) -> str:
        kind = "causal" if self.causal else "full"
        return kind if self.window is None else f"{kind}, window {self.window}"


def num_rows(rows: Rows) -> int:
    """How many rows these are."""
    return sum(piece.stop - piece.start for piece in rows)
