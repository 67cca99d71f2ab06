"""Collectives that pass tensors on: explicit pairs, and rings whose order the runtime chooses.

The rank of a ring's data is known at run time only, in a register: the position within the group,
which is what indexes a table with one row per rank of the group (so does nki-library's fgcc).

Source: nki.collectives.collective_permute, collective_permute_implicit(_reduce),
collective_permute_implicit_current_processing_rank_id; Neuron collectives guide (Permute).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.isa.issue import issue
from nxd_cp.simulators.nki_api.registers import Register
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run, current, note_name

from .exchange import Arrays, exchange, moving
from .group import own_group, ring
from .operands import begin, check_priority, one, operands, reduction, require_sizes

_PAIRS = documented(
    "collective.pairs",
    "nki.collectives.collective_permute; Neuron collectives guide",
    "source_target_pairs are pairs of ranks that run; every rank in them sends once and receives "
    "once (circular permutes)",
)
_CHANNELS = documented(
    "collective.channels",
    "nki.collectives.collective_permute_implicit",
    "one tensor per channel; channel ids 0, 1, ...; at most 4 channels for a group of all ranks, "
    "2 for a smaller one",
)
_ITERATION = documented(
    "collective.iteration",
    "nki.collectives.collective_permute_implicit_current_processing_rank_id",
    "iteration_id is an integer from 0",
)


def collective_permute(
    srcs: Any,
    dsts: Any,
    source_target_pairs: Any,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """dst of each target = src of its source; ranks outside the pairs do nothing."""
    instr = "nki.collectives.collective_permute"
    note_name(instr, name)
    run = current(instr)
    check_priority(run, instr, priority)
    pairs = [tuple(pair) for pair in source_target_pairs]
    sources, targets = [p[0] for p in pairs], [p[-1] for p in pairs]
    once = len(set(sources)) == len(pairs) == len(set(targets)) and set(sources) == set(targets)
    if not pairs or not once or any(r not in range(run.world.num_ranks) for r in sources):
        fail(_PAIRS, instr, f"{source_target_pairs} with {run.world.num_ranks} rank(s) running")
    given = operands(run, instr, one(instr, srcs), one(instr, dsts), hbm_only=True)
    require_sizes(instr, given.sources[0], given.destinations[0], given.sources[0].shape)
    if run.place.rank not in sources:
        return
    group = tuple(sorted(sources))
    come_from = dict(zip(targets, sources, strict=True))

    def compute(parts: list[Arrays]) -> list[Arrays]:
        return [parts[group.index(come_from[rank])] for rank in group]

    terms = {"source_target_pairs": pairs}
    order = _cycle(run.place.rank, dict(pairs))
    exchange(run, instr, given, group, moving(group, compute), terms=terms, rings=[order])


def _cycle(rank: int, following: dict[Any, Any]) -> tuple[int, ...]:
    """The ring of ranks that contains `rank`."""
    order = [rank]
    while following[order[-1]] != rank:
        order.append(following[order[-1]])
    return tuple(order)


def collective_permute_implicit(
    srcs_by_channel: Any,
    dsts_by_channel: Any,
    replica_group: Any,
    channel_ids: Any = (0,),
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """On every channel, dst = the src of the predecessor in that channel's ring."""
    instr = "nki.collectives.collective_permute_implicit"
    run, group = begin(instr, name, replica_group, priority)
    rings = _rings(run, instr, group, channel_ids)
    srcs = _by_channel(instr, srcs_by_channel, len(rings))
    dsts = _by_channel(instr, dsts_by_channel, len(rings))
    _permute(run, instr, srcs, dsts, group, rings, lambda arrays: arrays, {})


def collective_permute_implicit_reduce(
    srcs0_by_channel: Any,
    srcs1_by_channel: Any,
    dsts_by_channel: Any,
    replica_group: Any,
    op: Any,
    channel_ids: Any = (0,),
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """On every channel, dst = op(src0, src1) of the predecessor in that channel's ring."""
    instr = "nki.collectives.collective_permute_implicit_reduce"
    run, group = begin(instr, name, replica_group, priority)
    rings = _rings(run, instr, group, channel_ids)
    srcs0 = _by_channel(instr, srcs0_by_channel, len(rings))
    srcs1 = _by_channel(instr, srcs1_by_channel, len(rings))
    dsts = _by_channel(instr, dsts_by_channel, len(rings))
    function = reduction(instr, op)
    for src0, src1 in zip(srcs0, srcs1, strict=True):
        require_sizes(instr, src0, src1, src0.shape)

    def reduce(arrays: Arrays) -> Arrays:
        wide = [dtypes.to_f32(a, t.dtype) for a, t in zip(arrays, srcs0 + srcs1, strict=True)]
        return [function(a, b) for a, b in zip(wide[: len(srcs0)], wide[len(srcs0) :], strict=True)]

    _permute(run, instr, srcs0 + srcs1, dsts, group, rings, reduce, {"op": op.name}, volume=0.5)


def _permute(
    run: Run,
    instr: str,
    srcs: list[Any],
    dsts: list[Any],
    group: tuple[int, ...],
    rings: list[tuple[int, ...]],
    prepare: Callable[[Arrays], Arrays],
    terms: dict[str, Any],
    volume: float = 1.0,
) -> None:
    """Pass what `prepare` makes of the sources to the successors."""
    given = operands(run, instr, srcs, dsts, channels=True)
    for src, dst in zip(srcs, dsts, strict=False):
        require_sizes(instr, src, dst, src.shape)

    def compute(parts: list[Arrays]) -> list[Arrays]:
        made = [prepare(arrays) for arrays in parts]
        rows = []
        for rank in group:
            before = [order[order.index(rank) - 1] for order in rings]
            rows.append([made[group.index(b)][channel] for channel, b in enumerate(before)])
        return rows

    terms = {"channels": len(rings), **terms}
    exchange(
        run, instr, given, group, moving(group, compute), terms=terms, rings=rings, volume=volume
    )


def _rings(run: Run, instr: str, group: tuple[int, ...], channel_ids: Any) -> list[tuple[int, ...]]:
    ids = list(channel_ids)
    most = 4 if len(group) == run.world.num_ranks else 2
    if ids != list(range(len(ids))) or not 1 <= len(ids) <= most:
        fail(_CHANNELS, instr, f"channel_ids={ids} for a group of {len(group)} ranks")
    return [ring(run, group, channel) for channel in ids]


def _by_channel(instr: str, lists: Any, num_channels: int) -> list[Any]:
    nested = isinstance(lists, (list, tuple)) and all(isinstance(t, (list, tuple)) for t in lists)
    if not nested or len(lists) != num_channels or any(len(tensors) != 1 for tensors in lists):
        fail(_CHANNELS, instr, f"expected {num_channels} list(s) of one tensor", given=lists)
    return [tensors[0] for tensors in lists]


def collective_permute_implicit_current_processing_rank_id(
    iteration_id: int, replica_group: Any, channel_id: int = 0, name: str | None = None
) -> Register:
    """A register with the rank, within the group, whose data are here after `iteration_id` hops."""
    instr = "nki.collectives.collective_permute_implicit_current_processing_rank_id"
    note_name(instr, name)
    run = current(instr)
    group = own_group(run, instr, replica_group)
    if not isinstance(iteration_id, int) or iteration_id < 0:
        fail(_ITERATION, instr, f"iteration_id={iteration_id!r}")
    if channel_id not in range(4):
        fail(_CHANNELS, instr, f"channel_id={channel_id!r}")
    order = ring(run, group, channel_id)
    rank = order[(order.index(run.place.rank) - iteration_id) % len(order)]
    issue(run, "current_processing_rank_id", "all", None, (), 0, detail=str(len(group)))
    return Register(group.index(rank))
