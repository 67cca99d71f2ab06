"""Collectives over whole tensors: all_reduce, all_gather, reduce_scatter, all_to_all.

Sums go through fp32 in group order and are rounded once; the device's order is not documented.

Source: nki.collectives. Letter: n ranks of the group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.chips import NUM_PARTITIONS
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.memory import SBUF
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .exchange import Arrays, exchange, moving
from .operands import SIZES, Operands, begin, operands, reduction, require_sizes

_DIM = documented(
    "collective.dim",
    "nki.collectives",
    "collective_dim is 0, or 1 for all_gather in SBUF",
)


def all_reduce(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    op: Any,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """Every dst = the group's sources, reduced by op."""
    instr = "nki.collectives.all_reduce"
    run, given, group = _start(instr, name, srcs, dsts, replica_group, priority)
    function = reduction(instr, op)
    for src, dst in zip(given.sources, given.destinations, strict=True):
        require_sizes(instr, src, dst, src.shape)

    def compute(parts: list[Arrays]) -> list[Arrays]:
        return [_reduce(function, given, parts)] * len(parts)

    n = len(group)
    terms = {"op": op.name}
    exchange(run, instr, given, group, moving(group, compute), terms=terms, volume=2 * (n - 1) / n)


def all_gather(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    collective_dim: int,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """Every dst = the group's sources, one after another along collective_dim."""
    instr = "nki.collectives.all_gather"
    run, given, group = _start(instr, name, srcs, dsts, replica_group, priority)
    n, on_chip = len(group), given.sources[0].space == SBUF
    _check_dim(instr, collective_dim, (0, 1) if on_chip else (0,))
    for src, dst in zip(given.sources, given.destinations, strict=True):
        shape = list(src.shape)
        shape[collective_dim] *= n
        require_sizes(instr, src, dst, tuple(shape))
        if on_chip and shape[0] > NUM_PARTITIONS:
            fail(SIZES, instr, f"{shape[0]} partitions", src=src, dst=dst)

    def compute(parts: list[Arrays]) -> list[Arrays]:
        joined = [np.concatenate(arrays, collective_dim) for arrays in zip(*parts, strict=True)]
        return [joined] * n

    terms = {"collective_dim": collective_dim}
    exchange(run, instr, given, group, moving(group, compute), terms=terms, volume=n - 1)


def reduce_scatter(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    collective_dim: int,
    op: Any,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """dst of the i-th rank = the i-th part along dim 0 of the group's sources, reduced by op."""
    instr = "nki.collectives.reduce_scatter"
    run, given, group = _start(instr, name, srcs, dsts, replica_group, priority)
    n, function = len(group), reduction(instr, op)
    for src, dst in _divided(instr, given, n, collective_dim):
        require_sizes(instr, src, dst, (src.shape[0] // n, *src.shape[1:]))

    def compute(parts: list[Arrays]) -> list[Arrays]:
        totals = [np.split(total, n) for total in _reduce(function, given, parts)]
        return [[pieces[i] for pieces in totals] for i in range(n)]

    terms = {"collective_dim": collective_dim, "op": op.name}
    exchange(run, instr, given, group, moving(group, compute), terms=terms, volume=(n - 1) / n)


def all_to_all(
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    collective_dim: int,
    priority: int | None = None,
    name: str | None = None,
) -> None:
    """Part j along dim 0 of the dst of rank i = part i of the src of rank j."""
    instr = "nki.collectives.all_to_all"
    run, given, group = _start(instr, name, srcs, dsts, replica_group, priority, hbm_only=True)
    n = len(group)
    for src, dst in _divided(instr, given, n, collective_dim):
        require_sizes(instr, src, dst, src.shape)

    def compute(parts: list[Arrays]) -> list[Arrays]:
        cut = [[np.split(array, n) for array in arrays] for arrays in zip(*parts, strict=True)]
        return [[np.concatenate([c[i] for c in tensor]) for tensor in cut] for i in range(n)]

    terms = {"collective_dim": collective_dim}
    exchange(run, instr, given, group, moving(group, compute), terms=terms, volume=(n - 1) / n)


def _start(
    instr: str,
    name: str | None,
    srcs: Any,
    dsts: Any,
    replica_group: Any,
    priority: Any,
    hbm_only: bool = False,
) -> tuple[Run, Operands, tuple[int, ...]]:
    run, group = begin(instr, name, replica_group, priority)
    given = operands(run, instr, srcs, dsts, hbm_only=hbm_only)
    if len(given.sources) != len(given.destinations):
        fail(SIZES, instr, f"{len(given.sources)} sources, {len(given.destinations)} destinations")
    return run, given, group


def _divided(
    instr: str, given: Operands, parts: int, dim: Any
) -> Iterator[tuple[NkiTensor, NkiTensor]]:
    """Every (source, destination) of a collective that cuts dim 0 into parts."""
    _check_dim(instr, dim, (0,))
    for src, dst in zip(given.sources, given.destinations, strict=True):
        if src.shape[0] % parts:
            fail(SIZES, instr, f"dim 0 does not divide by {parts}", src=src, dst=dst)
        yield src, dst


def _check_dim(instr: str, dim: Any, legal: tuple[int, ...]) -> None:
    if dim not in legal:
        fail(_DIM, instr, f"collective_dim={dim}")


def _reduce(function: Any, given: Operands, parts: list[Arrays]) -> Arrays:
    """The fp32 reduction over the members of every tensor."""
    totals = []
    for src, arrays in zip(given.sources, zip(*parts, strict=True), strict=True):
        totals.append(functools.reduce(function, [dtypes.to_f32(a, src.dtype) for a in arrays]))
    return totals
