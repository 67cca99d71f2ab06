"""What makes a plan right, checked by expansion: pairs, moves, bytes, and freedom from deadlock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import permutations, product

from nxd_cp.schedule import (
    HEADER_BYTES,
    LAYOUTS,
    Bounded,
    Move,
    Plan,
    Rows,
    Tile,
    make_plan,
    seq_len_multiple,
    token_runs,
)
from nxd_cp.strategies.plan import StrategyPlan
from nxd_cp.strategies.routes import HeadGroup

Event = tuple[str, str, int]  # "post" or "wait", channel, step
Pair = tuple[int, int]


def every_plan(sizes: Iterable[int], *, chunk: int) -> list[Plan]:
    """Every layout, causal and full, with as short a sequence as `chunk` times the least."""
    return [
        make_plan(layout, size, chunk * seq_len_multiple(layout, size), causal=causal)
        for size, layout, causal in product(sizes, LAYOUTS, (True, False))
    ]


def tokens(plan: Plan, rank: int) -> list[int]:
    """Positions of the queries of a rank; those of padding are beyond the last token."""
    runs = token_runs(plan.layout, plan.size, rank, plan.seq_len)
    return [position for run in runs for position in run]


def keys(plan: Plan, rank: int) -> list[int]:
    """Positions of the keys of a rank."""
    runs = token_runs(plan.layout, plan.size, rank, plan.kv_len)
    return [position for run in runs for position in run]


def visible(tile: Tile, row: int, column: int) -> bool:
    if isinstance(tile.mask, Bounded):
        return row + tile.mask.low <= column <= row + tile.mask.high
    return {"full": True, "causal": column <= row, "strict": column < row}[tile.mask]


def pairs_computed(plan: Plan) -> Counter[Pair]:
    """Global (query, key) pairs of all tiles of all ranks, with how often each is computed."""
    found: Counter[Pair] = Counter()
    for rank in range(plan.size):
        mine = tokens(plan, rank)
        for step in plan.steps[rank]:
            theirs = keys(plan, step.owner)
            for tile in step.tiles:
                for row, q in enumerate(mine[tile.q]):
                    for column, k in enumerate(theirs[tile.k]):
                        if visible(tile, row, column):
                            found[q, k] += 1
    return found


def pairs_seen(plan: Plan) -> set[Pair]:
    """The pairs of the mask, from its definition alone."""
    shift = plan.num_kv_tokens - plan.num_tokens
    far = plan.seq_len + plan.kv_len
    left = far if plan.left is None else plan.left
    right = far if plan.right is None else plan.right
    return {
        (q, k)
        for q, k in product(range(plan.num_tokens), range(plan.num_kv_tokens))
        if -left <= k - (q + shift) <= right
    }


def check_pairs(plan: Plan, document: Callable[[int], int] | None = None) -> None:
    """Every visible pair once and no other. With documents, others may be computed, and masked."""
    found, seen = pairs_computed(plan), pairs_seen(plan)
    if document is None:
        assert found == Counter(dict.fromkeys(seen, 1))
        return
    wanted = {(q, k) for q, k in seen if document(q) == document(k)}
    assert all(found[pair] == 1 for pair in wanted), "a visible pair is missing or twice"
    assert set(found) <= seen, "a pair beyond the mask"
    for rank in range(plan.size):
        mine = tokens(plan, rank)
        for step in plan.steps[rank]:
            theirs = keys(plan, step.owner)
            for tile in step.tiles:
                inside = product(mine[tile.q], theirs[tile.k])
                assert any(pair in wanted for pair in inside), "a rectangle shows nothing"


def check_strategy(work: StrategyPlan) -> None:
    """Every visible pair once for every part of the heads; of "gather" also that what arrives is
    what the next step computes on, from its owner, that parts go home, and the bytes.
    """
    plan = work.plan
    found: list[Counter[Pair]] = [Counter() for _ in range(work.ways)]
    for rank in range(plan.size):
        part = 0 if work.groups is None else work.groups[rank].index
        mine = held(work, rank, tokens, "rows")
        for step in plan.steps[rank]:
            theirs = held(work, step.owner, keys, "key_rows")
            for tile in step.tiles:
                for row, q in enumerate(mine[tile.q]):
                    for column, k in enumerate(theirs[tile.k]):
                        found[part][q, k] += visible(tile, row, column)
    seen = Counter(dict.fromkeys(pairs_seen(plan), 1))
    assert all(+one == seen for one in found)
    if work.strategy.name == "gather" and plan.size > 1:
        check_gathered(plan)


def held(
    work: StrategyPlan, rank: int, of_rank: Callable[[Plan, int], list[int]], rows: str
) -> list[int]:
    """Positions of the queries, or keys, that a rank computes with: its own, or its group's."""
    if work.groups is None:
        return of_rank(work.plan, rank)
    group = work.groups[rank]
    joined: dict[int, int] = {}
    for member, pieces in zip(group.members, getattr(group, rows), strict=True):
        mine = of_rank(work.plan, member)
        for local, there in pieces:
            places = range(there.start, there.stop, there.step)
            assert not joined.keys() & set(places), "two rows in one place"
            joined |= zip(places, mine[local], strict=True)
    assert sorted(joined) == list(range(len(joined))), "a place without a row"
    return [joined[place] for place in sorted(joined)]


def check_gathered(plan: Plan) -> None:
    """Moves of the "gather" strategy: straight from the owner, and nothing that is not used."""
    for index in range(plan.num_steps):
        moves = {r: s[index].kv for r, s in enumerate(plan.steps) if s[index].kv is not None}
        check_ends(moves)
        for rank, steps in enumerate(plan.steps):
            following = steps[index + 1 : index + 2]
            used = expand(tuple(tile.k for step in following for tile in step.tiles))
            move = moves.get(rank)
            came = set() if move is None else expand(move.into)
            assert came == used, "what is seen, and nothing else"
            if came:
                assert move.source == move.brings == following[0].owner
    check_gradients(plan)
    check_bytes(plan)


def check_moves(plan: Plan) -> None:
    """Follow the rows of keys as data: sends match receives, what is computed on is here, what
    arrives is used, and gradients come home.
    """
    holds = {rank: (rank, set(range(plan.local_kv_len))) for rank in range(plan.size)}
    for index in range(plan.num_steps):
        for rank, steps in enumerate(plan.steps):
            step = steps[index]
            owner, rows = holds[rank]
            for tile in step.tiles:
                assert owner == step.owner, "keys are here"
                assert expand((tile.k,)) <= rows, "these rows are here"
        moves = {r: s[index].kv for r, s in enumerate(plan.steps) if s[index].kv is not None}
        check_ends(moves)
        arrived = {}
        for rank, move in moves.items():
            if move.to is not None:
                assert expand(move.out) <= holds[rank][1], "what is sent is here"
                assert moves[move.to].brings == holds[rank][0]
                arrived[move.to] = (holds[rank][0], expand(move.out))
        for rank, (owner, rows) in arrived.items():
            check_used(plan, rank, index + 1, owner, rows)
        holds |= arrived
    check_gradients(plan)


def check_ends(moves: dict[int, Move]) -> None:
    """A send has its receive, of the same rows, and the other way round."""
    for rank, move in moves.items():
        assert (move.to, move.source) != (None, None), "a move moves something"
        assert bool(move.out) == (move.to is not None)
        assert bool(move.into) == (move.source is not None)
        if move.to is not None:
            assert moves[move.to].source == rank, "a send has its receive"
            assert moves[move.to].into == move.out, "and the same rows"
        if move.source is not None:
            assert moves[move.source].to == rank, "a receive has its send"


def check_used(plan: Plan, rank: int, index: int, owner: int, rows: set[int]) -> None:
    """No dead hop: each row that arrives is computed on here or goes on; where all of a block
    travels, some rank on its way computes with it.
    """
    later = (steps[index:] for steps in plan.steps)
    assert any(s.owner == owner and s.tiles for steps in later for s in steps), "a hop is dead"
    if plan.gradient_route == "direct":
        step = plan.steps[rank][index]
        used = expand(tuple(tile.k for tile in step.tiles))
        onward = expand(step.kv.out) if step.kv is not None and step.kv.to is not None else set()
        assert rows <= used | onward, "rows arrive that nobody sees"


def check_gradients(plan: Plan) -> None:
    """On "travel" sums make the full turn; on "direct" each part goes to its owner."""
    if plan.gradient_route == "travel":
        holds = {rank: rank for rank in range(plan.size)}
        for index in range(plan.num_steps if plan.size > 1 else 0):
            moves = {rank: steps[index].grad for rank, steps in enumerate(plan.steps)}
            assert all(steps[index].owner == holds[r] for r, steps in enumerate(plan.steps))
            check_ends(moves)
            holds = {move.to: holds[rank] for rank, move in moves.items()}
            assert all(moves[rank].brings == owner for rank, owner in holds.items())
        assert holds == {rank: rank for rank in range(plan.size)}, "gradients come home"
        return
    for index in range(plan.num_steps):
        moves = {r: s[index].grad for r, s in enumerate(plan.steps) if s[index].grad is not None}
        check_ends(moves)
        assert all(move.brings == rank for rank, move in moves.items())
        sent = {(r, m.to): expand(m.out) for r, m in moves.items() if m.to is not None}
        computed = {
            (rank, steps[index].owner): expand(tuple(tile.k for tile in steps[index].tiles))
            for rank, steps in enumerate(plan.steps)
            if steps[index].tiles and index > 0
        }
        assert sent == computed, "each part goes straight home, and nothing else does"


def check_bytes(plan: Plan) -> None:
    """`traffic` is what the moves carry, counted row by row."""
    sizes = {"batch": 2, "num_kv_heads": 3, "head_dim": 5, "itemsize": 2, "v_head_dim": 4}
    for rank, steps in enumerate(plan.steps):
        traffic = plan.traffic(rank, **sizes)
        kv = [len(expand(s.kv.out)) for s in steps if s.kv is not None and s.kv.to is not None]
        grad = [
            len(expand(s.grad.out)) for s in steps if s.grad is not None and s.grad.to is not None
        ]
        row = 2 * 3 * (5 + 4)
        forward = sum(HEADER_BYTES + row * 2 * count for count in kv)
        assert (traffic.forward_messages, traffic.forward_bytes) == (len(kv), forward)
        backward = forward + sum(HEADER_BYTES + row * 4 * count for count in grad)
        assert (traffic.backward_messages, traffic.backward_bytes) == (
            len(kv) + len(grad),
            backward,
        )


def check_balance(plan: Plan) -> None:
    """`balance` is the busiest rank's pairs over the mean, step by step."""
    for index, ratio in enumerate(plan.balance()):
        counts = []
        for steps in plan.steps:
            tiles = steps[index].tiles
            counts.append(
                sum(visible(t, r, c) for t in tiles for r in range(t.q_len) for c in range(t.k_len))
            )
        assert ratio == (max(counts) * plan.size / sum(counts) if sum(counts) else 1.0)


def check_plan(plan: Plan, document: Callable[[int], int] | None = None) -> None:
    """All of the above, and that no order of events can block."""
    check_pairs(plan, document)
    check_moves(plan)
    check_bytes(plan)
    for backward in (False, True):
        check_progress(plan, backward=backward)


def expand(rows: Rows) -> set[int]:
    return {row for piece in rows for row in range(piece.start, piece.stop)}


# Deadlock


def program(plan: Plan, rank: int, *, backward: bool) -> list[Event]:
    """What a rank posts and waits for, in order, as `ring.forward` and `ring.backward` do."""
    events: list[Event] = []
    open_grad: int | None = None
    for step in plan.steps[rank]:
        if step.kv is not None:
            events.append(("post", "kv", step.index))
        if backward:
            if open_grad is not None:
                events.append(("wait", "grad", open_grad))
            open_grad = None
            if step.grad is not None:
                events.append(("post", "grad", step.index))
                open_grad = step.index
        if step.kv is not None:
            events.append(("wait", "kv", step.index))
    return [*events, ("wait", "grad", open_grad)] if open_grad is not None else events


def strategy_program(work: StrategyPlan, rank: int, *, backward: bool) -> list[Event]:
    """As `program`, of a strategy: all rounds, keys posted a round ahead, and exchanges of heads.

    The number of a round, or of an exchange, is part of the channel's name.
    """
    plan, num_rounds = work.plan, len(work.rounds)
    one = program(plan, rank, backward=backward)
    rounds = [[(kind, f"{name} {i}", at) for kind, name, at in one] for i in range(num_rounds)]
    if work.strategy.name == "gather" and plan.size > 1:
        ahead = [
            [e for e in events if e[0] == "post" and e[1] == f"kv {i}"]
            for i, events in enumerate(rounds)
        ]
        rest = [[e for e in events if e not in ahead[i]] for i, events in enumerate(rounds)]
        following = [*ahead[1:], []]
        return [*ahead[0], *(e for i in range(num_rounds) for e in (*following[i], *rest[i]))]
    before, after = (
        [
            (kind, f"heads {i}", distance)
            for kind in ("post", "wait")
            for distance in range(1, work.ways)
        ]
        for i in range(2)
    )
    return [*before, *(e for events in rounds for e in events), *after]


class Channels:
    """Which message meets which: between two ranks the n-th send meets the n-th receive."""

    def __init__(
        self,
        plan: Plan,
        programs: list[list[Event]],
        groups: tuple[HeadGroup, ...] | None = None,
    ) -> None:
        self.plan, self.programs, self.groups = plan, programs, groups
        self.posted = [{e[1:]: i for i, e in enumerate(p) if e[0] == "post"} for p in programs]
        sends, receives = defaultdict(list), defaultdict(list)
        for rank, events in enumerate(programs):
            for kind, channel, index in events:
                move = self.move(rank, channel, index)
                if kind == "post" and move.to is not None:
                    sends[rank, move.to].append((channel, index, move.out))
                if kind == "post" and move.source is not None:
                    receives[move.source, rank].append((channel, index, move.into))
        assert sends == receives, "messages between two ranks meet in their order"

    def move(self, rank: int, channel: str, index: int) -> Move:
        if channel.startswith("heads"):
            assert self.groups is not None, "heads have groups"
            mine = self.groups[rank]
            to, source = (mine.members[(mine.index + d) % mine.ways] for d in (index, -index))
            return Move(to, source, brings=source)
        step = self.plan.steps[rank][index]
        move = step.kv if channel.startswith("kv") else step.grad
        assert move is not None
        return move

    def can_pass(self, state: tuple[int, ...], rank: int) -> bool:
        """Whether the next event of `rank` can happen: a wait needs both peers to have posted."""
        kind, channel, index = self.programs[rank][state[rank]]
        if kind == "post":
            return True
        move = self.move(rank, channel, index)
        peers = [peer for peer in (move.to, move.source) if peer is not None]
        return all(state[peer] > self.posted[peer][channel, index] for peer in peers)


def check_progress(plan: Plan, *, backward: bool) -> None:
    """With unbuffered sends all ranks reach their end, in one order of events.

    Ranks are deterministic and an event that can happen stays possible until it does, so all other
    orders end where this one does; `check_every_order` tries them.
    """
    _run(Channels(plan, [program(plan, r, backward=backward) for r in range(plan.size)]))


def check_start_orders(work: StrategyPlan, *, backward: bool) -> None:
    """As `check_progress`, of a strategy, for every order in which the ranks may start: each goes
    on as far as it can before the next is looked at.
    """
    channels = _of_strategy(work, backward)
    programs = channels.programs
    for order in permutations(range(work.plan.size)):
        state = [0] * work.plan.size
        moved = True
        while moved:
            moved = False
            for rank in order:
                while state[rank] < len(programs[rank]) and channels.can_pass(tuple(state), rank):
                    state[rank] += 1
                    moved = True
        assert not unfinished(channels, state), f"blocked at {state}, started in order {order}"


def check_strategy_progress(work: StrategyPlan, *, backward: bool) -> None:
    """As `check_progress`, of a strategy."""
    _run(_of_strategy(work, backward))


def _of_strategy(work: StrategyPlan, backward: bool) -> Channels:
    ranks = range(work.plan.size)
    programs = [strategy_program(work, rank, backward=backward) for rank in ranks]
    return Channels(work.plan, programs, work.groups)


def _run(channels: Channels) -> None:
    state = [0] * len(channels.programs)
    while True:
        ready = [r for r in unfinished(channels, state) if channels.can_pass(tuple(state), r)]
        if not ready:
            break
        for rank in ready:
            state[rank] += 1
    assert not unfinished(channels, state), f"blocked at {state}"


def check_every_order(plan: Plan, *, backward: bool) -> int:
    """As `check_progress`, for every interleaving; returns how many states there are."""
    channels = Channels(plan, [program(plan, r, backward=backward) for r in range(plan.size)])
    start = (0,) * plan.size
    seen, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        waiting = unfinished(channels, state)
        ready = [rank for rank in waiting if channels.can_pass(state, rank)]
        assert ready or not waiting, f"blocked at {state}"
        for rank in ready:
            following = (*state[:rank], state[rank] + 1, *state[rank + 1 :])
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    return len(seen)


def unfinished(channels: Channels, state: list[int] | tuple[int, ...]) -> list[int]:
    return [r for r, events in enumerate(channels.programs) if state[r] < len(events)]
