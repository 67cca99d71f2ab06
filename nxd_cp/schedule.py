"""The ring as data: who holds which tokens, what each step computes, what moves.

Does: turn (layout, causal, ring size, ring order, length) into a `Plan` of integers and slices.
Does not: touch tensors, ranks of a process group, or time. Standard library only, so that the eager
executor, a fused kernel and the cluster simulator can all read the same plan.

Letters: n ring size, S tokens of the whole sequence, run a `range` of global token positions.
Source: Ring Attention (arXiv 2310.01889), Striped Attention (arXiv 2311.09431) and the zigzag
order of Llama-3 style context parallelism.

Note [Masks come from runs]
    Every layout gives a rank one or two runs with a common stride. Take a query run and a key run
    with stride t, and let offset = floor((q.start - k.start) / t). Row i sees column j exactly when
    j <= i + offset. So offset 0 is "causal", -1 is "strict", a large one is "full", a small one is
    nothing at all, and no other code needs to know which layout it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

Layout = Literal["contiguous", "zigzag", "striped"]
MaskKind = Literal["full", "causal", "strict"]

LAYOUTS: tuple[str, ...] = get_args(Layout)
HEADER_BYTES = 64  # every message starts with its sequence numbers
GRADIENT_ITEMSIZE = 4  # partial gradients of keys and values travel in fp32


@dataclass(frozen=True)
class Tile:
    """One rectangle of scores: local query rows x rows of the visiting keys, and the mask inside.

    "causal": row i sees columns 0..i. "strict": row i sees columns 0..i-1. Both are square.
    """

    q: slice
    k: slice
    mask: MaskKind

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
        if self.mask == "full":
            return self.q_len * self.k_len
        return self.q_len * (self.q_len + (1 if self.mask == "causal" else -1)) // 2

    def __str__(self) -> str:
        return f"q[{self.q.start}:{self.q.stop}] x k[{self.k.start}:{self.k.stop}] {self.mask}"


@dataclass(frozen=True)
class Move:
    """One exchange: what is here goes to group rank `to`, what comes in is from `source`.

    brings: the group rank that owns what comes in.
    """

    to: int
    source: int
    brings: int


@dataclass(frozen=True)
class Step:
    """What one rank does in one turn of the ring.

    owner: group rank whose keys and values are here. tiles: rectangles to compute, maybe none.
    kv: the move of keys and values during this step, None on the last. grad: the move of the
    visitor's gradients at the end of this step in the backward (the last brings our own home), None
    when the ring has one rank.
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
        for index in range(self.size):
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
        num_kv = sum(step.kv is not None for step in self.steps[rank])
        num_grad = sum(step.grad is not None for step in self.steps[rank])
        return Traffic(
            forward_messages=num_kv,
            forward_bytes=num_kv * kv_bytes,
            backward_messages=num_kv + num_grad,
            backward_bytes=num_kv * kv_bytes + num_grad * grad_bytes,
        )

    def table(self) -> str:
        """The plan as text: one line per rank and step, then the balance of each step."""
        kind = "causal" if self.causal else "full"
        lines = [
            f"{self.layout}, {self.size} ranks, {self.seq_len} tokens "
            f"({self.local_len} per rank), {kind}, ring {' -> '.join(map(str, self.ring_order))}",
            f"{'rank':>4}  {'step':>4}  {'kv of':>5}  {'sends to':>8}  {'pairs':>10}  tiles",
        ]
        for rank, steps in enumerate(self.steps):
            for step in steps:
                to = "-" if step.kv is None else str(step.kv.to)
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
    ring_order: tuple[int, ...] | None = None,
) -> Plan:
    """The schedule of a ring of `size` ranks over `seq_len` tokens (of the whole sequence).

    ring_order: group ranks in the order in which messages travel (default 0, 1, ..., n - 1); it
    changes who talks to whom, never who holds what. Raises ValueError as `token_runs` does.
    """
    order = tuple(range(size)) if ring_order is None else tuple(ring_order)
    if sorted(order) != list(range(size)):
        raise ValueError(f"ring_order: expected a permutation of 0..{size - 1}, got {order}")
    runs = [token_runs(layout, size, rank, seq_len) for rank in range(size)]
    place = {rank: index for index, rank in enumerate(order)}

    def step(rank: int, index: int) -> Step:
        def left(distance: int) -> int:
            return order[(place[rank] - distance) % size]

        owner = left(index)
        move = Move(to=left(-1), source=left(1), brings=left(index + 1)) if size > 1 else None
        return Step(
            index=index,
            owner=owner,
            tiles=_tiles(runs[rank], runs[owner], causal),
            kv=move if index < size - 1 else None,
            grad=move,
        )

    steps = tuple(tuple(step(rank, i) for i in range(size)) for rank in range(size))
    return Plan(layout, size, seq_len, causal, order, steps)


def _tiles(q_runs: tuple[range, ...], k_runs: tuple[range, ...], causal: bool) -> tuple[Tile, ...]:
    """The fewest rectangles that hold every visible pair of these runs once."""
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
