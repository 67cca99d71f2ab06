"""The ring as data: who holds which tokens, what each step computes, what moves.

Does: turn (layout, mask, ring size, ring order, length) into a `Plan` of integers and slices.
Does not: touch tensors, ranks of a process group, or time. Standard library only, so that the eager
executor, a fused kernel and the cluster simulator can all read the same plan.

Letters: n ring size, S tokens of the whole sequence, run a `range` of global token positions.
Source: Ring Attention (arXiv 2310.01889), Striped Attention (arXiv 2311.09431) and the zigzag
order of Llama-3 style context parallelism.

Note [Masks come from runs]
    Every layout gives a rank one or two runs with a common stride. Take a query run and a key run
    with stride t, and let offset = floor((q.start - k.start) / t). Row i sees column j exactly when
    j <= i + offset. So offset 0 is "causal", -1 is "strict", a large one is "full", a small one is
    nothing at all, and no other code needs to know which layout it was. A window of w tokens adds
    a lower bound, j >= i + ceil((q.start - k.start - w + 1) / t), which makes a band: "bounded".

Note [What a window spares]
    Rectangles are cut to the rows and columns that the window reaches. A block of keys travels only
    as far as the last rank that sees some of it, so ranks may receive without sending on, or
    neither. Gradients of a block then go straight to its owner from each rank that computed some;
    a full turn to come home would be longer than the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

Layout = Literal["contiguous", "zigzag", "striped"]
MaskKind = Literal["full", "causal", "strict"]
GradientRoute = Literal["travel", "direct"]

LAYOUTS: tuple[str, ...] = get_args(Layout)
HEADER_BYTES = 64  # every message starts with its sequence numbers
GRADIENT_ITEMSIZE = 4  # partial gradients of keys and values travel in fp32


@dataclass(frozen=True)
class Bounded:
    """A band of a rectangle: row i sees columns i + low to i + high, as far as they exist."""

    low: int
    high: int

    def columns(self, row: int, num_columns: int) -> range:
        """The columns that `row` sees."""
        return range(max(0, row + self.low), min(num_columns, row + self.high + 1))

    def within(self, first_row: int, first_column: int) -> Bounded:
        """The same band, counted from another corner."""
        shift = first_row - first_column
        return Bounded(self.low + shift, self.high + shift)

    def __str__(self) -> str:
        return f"bounded {self.low:+d}..{self.high:+d}"


Mask = MaskKind | Bounded


@dataclass(frozen=True)
class Tile:
    """One rectangle of scores: local query rows x rows of the visiting keys, and the mask inside.

    "causal": row i sees columns 0..i. "strict": row i sees columns 0..i-1. Both are square.
    """

    q: slice
    k: slice
    mask: Mask

    @property
    def q_len(self) -> int:
        """Number of query rows."""
        return self.q.stop - self.q.start

    @property
    def k_len(self) -> int:
        """Number of key rows."""
        return self.k.stop - self.k.start

    @property
    def num_pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        if isinstance(self.mask, Bounded):
            return sum(len(self.mask.columns(row, self.k_len)) for row in range(self.q_len))
        if self.mask == "full":
            return self.q_len * self.k_len
        return self.q_len * (self.q_len + (1 if self.mask == "causal" else -1)) // 2

    def __str__(self) -> str:
        return f"q[{self.q.start}:{self.q.stop}] x k[{self.k.start}:{self.k.stop}] {self.mask}"


@dataclass(frozen=True)
class Move:
    """One exchange: what is here goes to group rank `to`, what comes in is from `source`.

    Either may be None, and then nothing is sent or nothing comes in. brings: the group rank that
    owns what comes in.
    """

    to: int | None
    source: int | None
    brings: int


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
    """The whole schedule. `steps[rank][i]` is step i of group rank `rank`; slices are local."""

    layout: str
    size: int
    seq_len: int
    causal: bool
    ring_order: tuple[int, ...]
    steps: tuple[tuple[Step, ...], ...]
    window: int | None = None
    gradient_route: GradientRoute = "travel"

    @property
    def num_steps(self) -> int:
        """Number of steps, equal on all ranks; fewer than ranks when a window spares the rest."""
        return len(self.steps[0])

    @property
    def local_len(self) -> int:
        """Number of tokens that each rank holds."""
        return self.seq_len // self.size

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
        self, rank: int, *, batch: int, num_kv_heads: int, head_dim: int, itemsize: int
    ) -> Traffic:
        """What `rank` sends in one forward and one backward.

        itemsize: bytes per element of keys and values. Gradients travel in fp32. The agreement
        check before a call is not counted here (see `nxd_cp.transport.agreement`).
        """
        elements = 2 * batch * num_kv_heads * self.local_len * head_dim
        kv_bytes = elements * itemsize + HEADER_BYTES
        grad_bytes = elements * GRADIENT_ITEMSIZE + HEADER_BYTES
        num_kv = sum(_sends(step.kv) for step in self.steps[rank])
        num_grad = sum(_sends(step.grad) for step in self.steps[rank])
        return Traffic(
            forward_messages=num_kv,
            forward_bytes=num_kv * kv_bytes,
            backward_messages=num_kv + num_grad,
            backward_bytes=num_kv * kv_bytes + num_grad * grad_bytes,
        )

    def table(self) -> str:
        """The plan as text: one line per rank and step, then the balance of each step."""
        kind = "causal" if self.causal else "full"
        kind += f", window {self.window}" if self.window else ""
        lines = [
            f"{self.layout}, {self.size} ranks, {self.seq_len} tokens "
            f"({self.local_len} per rank), {kind}, ring {' -> '.join(map(str, self.ring_order))}",
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


def seq_len_multiple(layout: str, size: int) -> int:
    """The whole sequence must be a multiple of this many tokens."""
    return 2 * size if layout == "zigzag" and size > 1 else size


def token_runs(layout: str, size: int, rank: int, seq_len: int) -> tuple[range, ...]:
    """Global positions of the tokens that `rank` holds; local order is their concatenation.

    Raises ValueError for an unknown layout, a rank outside the ring or a length that does not cut.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 <= rank < size, got rank {rank} of {size}")
    multiple = seq_len_multiple(layout, size)
    if seq_len < multiple or seq_len % multiple:
        raise ValueError(
            f"sequence length: expected a positive multiple of {multiple} "
            f"({layout}, {size} ranks), got {seq_len}; pad the batch"
        )
    if layout == "striped":
        return (range(rank, seq_len, size),)
    if layout == "contiguous" or size == 1:
        length = seq_len // size
        return (range(rank * length, (rank + 1) * length),)
    half = seq_len // (2 * size)
    mirror = 2 * size - 1 - rank
    return (range(rank * half, (rank + 1) * half), range(mirror * half, (mirror + 1) * half))


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
    window: int | None = None,
    ring_order: tuple[int, ...] | None = None,
) -> Plan:
    """The schedule of a ring of `size` ranks over `seq_len` tokens (of the whole sequence).

    window: each query sees that many keys, its own included (causal only); None is all.
    ring_order: group ranks in the order in which messages travel (default 0, 1, ..., n - 1); it
    changes who talks to whom, never who holds what. Raises ValueError as `token_runs` does.
    """
    order = tuple(range(size)) if ring_order is None else tuple(ring_order)
    if sorted(order) != list(range(size)):
        raise ValueError(f"ring_order: expected a permutation of 0..{size - 1}, got {order}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window: expected at least 1 and a causal mask, got {window} and causal={causal}"
        )
    runs = [token_runs(layout, size, rank, seq_len) for rank in range(size)]
    if window is not None and window >= seq_len:
        window = None
    ring = _Ring(order, [[_tiles(q, k, causal, window) for k in runs] for q in runs])
    make_step, num_steps = ring.step, size
    if window is not None:
        make_step, num_steps = ring.sparing_step, 1 + max(ring.reach)
    steps = tuple(tuple(make_step(rank, i) for i in range(num_steps)) for rank in range(size))
    route: GradientRoute = "travel" if window is None else "direct"
    return Plan(layout, size, seq_len, causal, order, steps, window, route)


class _Ring:
    """Rank arithmetic: who is where on the ring, and what moves. tiles[rank][owner] are given."""

    def __init__(self, order: tuple[int, ...], tiles: list[list[tuple[Tile, ...]]]) -> None:
        self.order, self.tiles, self.size = order, tiles, len(order)
        self.place = {rank: index for index, rank in enumerate(order)}
        self.reach = [max(self._seen_at(owner)) for owner in range(self.size)]

    def left(self, rank: int, distance: int) -> int:
        """The rank that is `distance` places back on the ring."""
        return self.order[(self.place[rank] - distance) % self.size]

    def _seen_at(self, owner: int) -> list[int]:
        """Distances at which a rank sees some of the keys of `owner`; 0 is always one."""
        ranks = [self.left(owner, -distance) for distance in range(self.size)]
        return [distance for distance, rank in enumerate(ranks) if self.tiles[rank][owner]]

    def step(self, rank: int, index: int) -> Step:
        """A step of a ring in which everything makes the full turn."""
        owner, incoming = self.left(rank, index), self.left(rank, index + 1)
        move = Move(self.left(rank, -1), self.left(rank, 1), brings=incoming)
        return Step(
            index=index,
            owner=owner,
            tiles=self.tiles[rank][owner],
            kv=move if index < self.size - 1 else None,
            grad=move if self.size > 1 else None,
        )

    def sparing_step(self, rank: int, index: int) -> Step:
        """A step in which only what is seen moves; see Note [What a window spares]."""
        owner, incoming = self.left(rank, index), self.left(rank, index + 1)
        user = self.left(rank, -index)  # computes with our keys in this step
        return Step(
            index=index,
            owner=owner,
            tiles=self.tiles[rank][owner],
            kv=_move(
                self.left(rank, -1) if self.reach[owner] > index else None,
                self.left(rank, 1) if self.reach[incoming] > index else None,
                brings=incoming,
            ),
            grad=_move(
                owner if index and self.tiles[rank][owner] else None,
                user if index and self.tiles[user][rank] else None,
                brings=rank,
            ),
        )


def _move(to: int | None, source: int | None, *, brings: int) -> Move | None:
    return None if to is source is None else Move(to, source, brings)


def _sends(move: Move | None) -> bool:
    return move is not None and move.to is not None


def _tiles(
    q_runs: tuple[range, ...], k_runs: tuple[range, ...], causal: bool, window: int | None
) -> tuple[Tile, ...]:
    """Rectangles that hold every visible pair of these runs once; the fewest without a window."""
    if window is not None:
        return _window_tiles(q_runs, k_runs, window)
    q_len, k_len = sum(map(len, q_runs)), sum(map(len, k_runs))
    if not causal:
        return (Tile(slice(0, q_len), slice(0, k_len), "full"),)
    if q_runs == k_runs:  # runs ascend, so the local order is the global one
        return (Tile(slice(0, q_len), slice(0, k_len), "causal"),)
    tiles: list[Tile] = []
    q_start = 0
    for q_run in q_runs:
        k_start = 0
        row: list[Tile] = []
        for k_run in k_runs:
            mask = _mask(q_run, k_run)
            if mask is not None:
                q, k = slice(q_start, q_start + len(q_run)), slice(k_start, k_start + len(k_run))
                _append_joined(row, Tile(q, k, mask))
            k_start += len(k_run)
        q_start += len(q_run)
        for tile in row:
            _append_joined(tiles, tile)
    return tuple(tiles)


def _window_tiles(
    q_runs: tuple[range, ...], k_runs: tuple[range, ...], window: int
) -> tuple[Tile, ...]:
    """One rectangle per pair of runs, cut to what the window reaches."""
    tiles: list[Tile] = []
    q_start = 0
    for q_run in q_runs:
        k_start = 0
        for k_run in k_runs:
            tile = _window_tile(q_run, k_run, q_start, k_start, window)
            if tile is not None:
                tiles.append(tile)
            k_start += len(k_run)
        q_start += len(q_run)
    return tuple(tiles)


def _window_tile(
    q_run: range, k_run: range, q_start: int, k_start: int, window: int
) -> Tile | None:
    """The rectangle between two runs that start at these local rows; None when it is empty."""
    assert q_run.step == k_run.step, f"runs of one layout share a stride: {q_run}, {k_run}"
    distance, stride = q_run.start - k_run.start, q_run.step
    band = Bounded(low=-((window - 1 - distance) // stride), high=distance // stride)
    rows = range(max(0, -band.high), min(len(q_run), len(k_run) - band.low))
    if band.low > band.high or not rows:
        return None
    columns = range(max(0, rows.start + band.low), min(len(k_run), rows.stop + band.high))
    return Tile(
        slice(q_start + rows.start, q_start + rows.stop),
        slice(k_start + columns.start, k_start + columns.stop),
        _simplest(band.within(rows.start, columns.start), len(rows), len(columns)),
    )


def _simplest(band: Bounded, num_rows: int, num_columns: int) -> Mask:
    """ "full" or "causal" where the band is just that; no tile of a window is "strict"."""
    if num_rows - 1 + band.low > 0:
        return band
    if band.high >= num_columns - 1:
        return "full"
    return "causal" if band.high == 0 and num_rows == num_columns else band


def _mask(q_run: range, k_run: range) -> MaskKind | None:
    """The mask between two runs; see Note [Masks come from runs]."""
    assert q_run.step == k_run.step, f"runs of one layout share a stride: {q_run}, {k_run}"
    offset = (q_run.start - k_run.start) // q_run.step
    if offset <= -len(q_run):
        return None
    if offset >= len(k_run) - 1:
        return "full"
    assert offset in (0, -1), f"no mask for {q_run} x {k_run}"
    assert len(q_run) == len(k_run), f"expected a square, got {q_run} x {k_run}"
    return "causal" if offset == 0 else "strict"


def _append_joined(tiles: list[Tile], new: Tile) -> None:
    """Append `new`, or grow the last tile when both are full and share an edge."""
    if tiles and tiles[-1].mask == new.mask == "full":
        last = tiles[-1]
        if last.q == new.q and last.k.stop == new.k.start:
            tiles[-1] = Tile(new.q, slice(last.k.start, new.k.stop), "full")
            return
        if last.k == new.k and last.q.stop == new.q.start:
            tiles[-1] = Tile(slice(last.q.start, new.q.stop), new.k, "full")
            return
    tiles.append(new)
