"""Who does what when: the steps of each rank, and what moves between them.

Does: rank arithmetic, once, for every mask and layout. Does not: know what a mask is.

Note [What a mask spares]
    Where no rank sees any key of some other rank, its keys need not go there. A block of keys then
    travels only as far as the last rank that sees some of it, and of its rows only those that some
    rank on the rest of the way sees; ranks may receive without sending on, or neither. Gradients of
    a block go straight to its owner from each rank that computed some; a full turn to come home
    would be longer than the way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from nxd_cp.schedule.layout import token_runs
from nxd_cp.schedule.masks import Sight, Tile, tiles
from nxd_cp.schedule.plan import GradientRoute, Move, Plan, Rows, Step

Window = int | tuple[int | None, int | None] | None
Tiles = tuple[Tile, ...]


def ring_moves(ring_order: tuple[int, ...], rank: int) -> tuple[Move, ...]:
    """The moves by which everything that starts on a rank is seen by all: one less than ranks."""
    size, place = len(ring_order), ring_order.index(rank)
    to, source = ring_order[(place + 1) % size], ring_order[place - 1]
    return tuple(
        Move(to, source, brings=ring_order[(place - distance) % size])
        for distance in range(1, size)
    )


@lru_cache(maxsize=256)
def make_plan(
    layout: str,
    size: int,
    seq_len: int,
    *,
    causal: bool = True,
    window: Window = None,
    ring_order: tuple[int, ...] | None = None,
    kv_len: int | None = None,
    num_tokens: int | None = None,
    num_kv_tokens: int | None = None,
) -> Plan:
    """The schedule of a ring of `size` ranks over `seq_len` query slots (of the whole sequence).

    window: a number of keys that each query sees, its own included (causal only), or (left, right),
    how many it sees before and after its own; None is all, also as left or right.
    ring_order: group ranks in the order in which messages travel (default 0, 1, ..., n - 1); it
    changes who talks to whom, never who holds what.
    kv_len: key slots, default `seq_len`. num_tokens, num_kv_tokens: slots that hold a token,
    default all (keys: as many as queries where there are as many slots). The last query sees the
    last key.
    Raises ValueError as `token_runs` does.
    """
    order = tuple(range(size)) if ring_order is None else tuple(ring_order)
    if sorted(order) != list(range(size)):
        raise ValueError(f"ring_order: expected a permutation of 0..{size - 1}, got {order}")
    kv_len = seq_len if kv_len is None else kv_len
    num_tokens = seq_len if num_tokens is None else num_tokens
    if num_kv_tokens is None:
        num_kv_tokens = num_tokens if kv_len == seq_len else kv_len
    ranks = range(size)
    q_runs = [token_runs(layout, size, rank, seq_len, num_tokens) for rank in ranks]
    k_runs = [token_runs(layout, size, rank, kv_len, num_kv_tokens) for rank in ranks]
    left, right = _reach(causal, window, num_tokens, num_kv_tokens)
    sight = Sight(left, right, num_kv_tokens - num_tokens)
    rectangles = [[tiles(q, k, sight) for k in k_runs] for q in q_runs]
    empty = Plan(
        layout,
        size,
        seq_len,
        kv_len,
        num_tokens,
        num_kv_tokens,
        left,
        right,
        order,
        steps=(),
        local_tokens=tuple(sum(map(len, runs)) for runs in q_runs),
    )
    some_see_nothing = any(not here for mine in rectangles for here in mine)
    return _with_steps(empty, rectangles, spares=left is not None or some_see_nothing)


def spare(plan: Plan, seen: Iterable[tuple[int, int, Tile]]) -> Plan:
    """The plan with these tiles (rank, owner, tile) only, and only what they need on the move."""
    kept: list[list[list[Tile]]] = [[[] for _ in range(plan.size)] for _ in range(plan.size)]
    for rank, owner, tile in seen:
        kept[rank][owner].append(tile)
    return _with_steps(plan, [[tuple(t) for t in mine] for mine in kept], spares=True)


def _reach(
    causal: bool, window: Window, num_tokens: int, num_kv_tokens: int
) -> tuple[int | None, int | None]:
    """Left and right of a `Sight`; None where an end lies beyond every key."""
    if isinstance(window, int) or (causal and window is not None and window[1] not in (None, 0)):
        if not causal or not isinstance(window, int) or window < 1:
            raise ValueError(
                f"window: expected at least 1 and a causal mask, or (left, right), with right 0 "
                f"where causal, got {window} and causal={causal}"
            )
        window = (window - 1, 0)
    left, right = (None, None) if window is None else window
    right = 0 if causal else right
    if any(end is not None and end < 0 for end in (left, right)):
        raise ValueError(f"window: expected (left, right) of at least 0 or None, got {window}")
    if left is not None and left >= num_kv_tokens - 1:
        left = None  # the last query's place is the last key's
    if right is not None and right >= max(num_tokens, num_kv_tokens) - 1 and not causal:
        right = None
    return left, right


def _with_steps(plan: Plan, rectangles: list[list[Tiles]], *, spares: bool) -> Plan:
    ring = _Ring(plan.ring_order, rectangles, slice(0, plan.local_kv_len))
    make_step, num_steps = ring.step, plan.size
    if spares:
        make_step, num_steps = ring.sparing_step, 1 + max(ring.reach)
    ranks = range(plan.size)
    steps = tuple(tuple(make_step(rank, i) for i in range(num_steps)) for rank in ranks)
    route: GradientRoute = "direct" if spares else "travel"
    return replace(plan, steps=steps, gradient_route=route)


class _Ring:
    """Rank arithmetic: who is where on the ring, and what moves. tiles[rank][owner] are given."""

    def __init__(self, order: tuple[int, ...], tiles: list[list[Tiles]], whole: slice) -> None:
        self.order, self.tiles, self.size, self.whole = order, tiles, len(order), whole
        self.place = {rank: index for index, rank in enumerate(order)}
        self.reach = [max(self._seen_at(owner)) for owner in range(self.size)]

    def left(self, rank: int, distance: int) -> int:
        """The rank that is `distance` places back on the ring."""
        return self.order[(self.place[rank] - distance) % self.size]

    def _seen_at(self, owner: int) -> list[int]:
        """Distances at which a rank sees some of the keys of `owner`; 0 counts as one."""
        ranks = [self.left(owner, -distance) for distance in range(self.size)]
        return [d for d, rank in enumerate(ranks) if d == 0 or self.tiles[rank][owner]]

    def _rows_from(self, owner: int, distance: int) -> Rows:
        """Rows of `owner` that some rank at `distance` or beyond sees."""
        ranks = (self.left(owner, -d) for d in range(distance, self.size))
        return union(tile.k for rank in ranks for tile in self.tiles[rank][owner])

    def step(self, rank: int, index: int) -> Step:
        """A step of a ring in which everything makes the full turn."""
        owner, incoming = self.left(rank, index), self.left(rank, index + 1)
        rows = (self.whole,)
        move = Move(self.left(rank, -1), self.left(rank, 1), incoming, out=rows, into=rows)
        return Step(
            index=index,
            owner=owner,
            tiles=self.tiles[rank][owner],
            kv=move if index < self.size - 1 else None,
            grad=move if self.size > 1 else None,
        )

    def sparing_step(self, rank: int, index: int) -> Step:
        """A step in which only what is seen moves; see Note [What a mask spares]."""
        owner, incoming = self.left(rank, index), self.left(rank, index + 1)
        user = self.left(rank, -index)  # computes with our keys in this step
        return Step(
            index=index,
            owner=owner,
            tiles=self.tiles[rank][owner],
            kv=one_move(
                self.left(rank, -1),
                self.left(rank, 1),
                brings=incoming,
                out=self._rows_from(owner, index + 1),
                into=self._rows_from(incoming, index + 1),
            ),
            grad=one_move(
                owner,
                user,
                brings=rank,
                out=union(tile.k for tile in self.tiles[rank][owner]) if index else (),
                into=union(tile.k for tile in self.tiles[user][rank]) if index else (),
            ),
        )


def one_move(to: int, source: int, *, brings: int, out: Rows, into: Rows) -> Move | None:
    """The exchange, one-sided where one side has no rows, and None where both have none."""
    if not out and not into:
        return None
    return Move(to if out else None, source if into else None, brings, out, into)


def union(pieces: Iterable[slice]) -> Rows:
    """The rows in any of these pieces."""
    rows: list[slice] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if rows and piece.start <= rows[-1].stop:
            rows[-1] = slice(rows[-1].start, max(rows[-1].stop, piece.stop))
        else:
            rows.append(piece)
    return tuple(rows)
