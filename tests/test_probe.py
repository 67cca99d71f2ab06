"""The probe: whatever fails on one rank alone, all ranks hear the same, in bounded time."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Failure, RankGroup

from nxd_cp.context import CPContext
from nxd_cp.transport import DistributedTransport, probe

probing = importlib.import_module("nxd_cp.transport.probe")

TRY_S = 2.0
BOUND_S = 20.0  # a third of the timeout of the default group


@pytest.fixture
def own_ranks() -> Iterator[RankGroup]:
    """Three ranks for one test; they may be broken."""
    group = RankGroup(3, group_timeout_s=3)
    yield group
    group.close()


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def probe_where(group: dist.ProcessGroup, fails_on: dict[str, list[int]], how: str) -> Any:
    """The verdict when some tries fail on some ranks alone, groups that are left over, and whether
    new groups and the old one work afterwards.
    """
    rank, before, started = dist.get_rank(group), num_groups(), monotonic()
    saved = {name: getattr(dist, name) for name in fails_on}
    for name, where in fails_on.items():
        if rank in where:
            setattr(dist, name, lambda *a, right=saved[name], **k: fail(how, right, a, k))
    try:
        verdict = probe(timeout_s=TRY_S)
    except RuntimeError as error:
        verdict = str(error)
    finally:
        for name, right in saved.items():
            setattr(dist, name, right)
    assert monotonic() - started < BOUND_S
    left = num_groups() - before
    sums = []
    for one in (group, dist.new_group()):
        sums.append(float(CPContext.from_group(one).all_reduce(torch.ones(()) * rank)))
    return verdict.removeprefix(f"rank {rank}: "), left, sums


class Odd(Exception):
    """An error of no kind that torch.distributed raises."""


def fail(how: str, right: Any, given: Any, options: Any) -> Any:
    if how == "silent":
        return []
    if how == "late":
        sleep(TRY_S + 1.5)
        return right(*given, **options)
    raise Odd("planted") if how == "odd" else RuntimeError("planted")


@pytest.mark.parametrize("how", ["raises", "odd", "silent", "late"])
@pytest.mark.parametrize(
    ("fails_on", "verdict"),
    [
        ({}, "p2p"),
        ({"batch_isend_irecv": [0, 1, 2, 3]}, "all_to_all"),
        ({"batch_isend_irecv": [1]}, "all_to_all"),
        ({"batch_isend_irecv": [1], "all_to_all_single": [2]}, "neither"),
    ],
)
def test_all_ranks_agree_also_when_a_try_fails_on_one_alone(
    ranks: RankGroup, fails_on: dict[str, list[int]], verdict: str, how: str
) -> None:
    if how == "late" and len(fails_on.get("batch_isend_irecv", [])) == 4:
        verdict = "p2p"  # all are equally late
    for found, left, sums in ranks.run(probe_where, fails_on, how):
        if verdict == "neither":
            assert "which lacks both on some rank; p2p failed: " in found
            assert ". all_to_all failed: " in found
        else:
            assert found == verdict
        assert left == 0, "no trial group is left"
        assert sums == [6.0, 6.0]


def test_the_reasons_are_told_to_all_with_their_ranks(ranks: RankGroup) -> None:
    fails_on = {"batch_isend_irecv": [0, 1, 2, 3], "all_to_all_single": [0, 1, 2, 3]}
    texts = {found for found, _, _ in ranks.run(probe_where, fails_on, "odd")}
    (text,) = texts
    everywhere = "; ".join(f"rank {rank}: Odd: planted" for rank in range(4))
    assert text.endswith(f"p2p failed: {everywhere}. all_to_all failed: {everywhere}")


@pytest.mark.parametrize("how", ["raises", "odd"])
def test_a_group_that_one_rank_cannot_make_is_a_no_on_all(own_ranks: RankGroup, how: str) -> None:
    outcomes = own_ranks.run(probe_without_groups, how)
    assert len({text for text, _ in outcomes}) == 1
    text, _ = outcomes[0]
    assert "which lacks both on some rank" in text
    assert "rank 1: " in text
    assert "planted" in text
    assert {left for _, left in outcomes} == {0}


def probe_without_groups(group: dist.ProcessGroup, how: str) -> tuple[str, int]:
    """Rank 1 cannot make a group; those that exist go on working."""
    rank, right, before = dist.get_rank(), dist.new_group, num_groups()
    if rank == 1:
        dist.new_group = lambda *a, **k: fail(how, right, a, k)
    try:
        with pytest.raises(RuntimeError) as caught:
            probe(timeout_s=TRY_S)
    finally:
        dist.new_group = right
    cp = CPContext.from_group(group)
    assert float(cp.all_reduce(torch.ones(()))) == 3.0
    return str(caught.value).removeprefix(f"rank {rank}: "), num_groups() - before


def wrong_timeout(group: dist.ProcessGroup, timeout_s: Any) -> tuple[str, list[float]]:
    """Rank 1 gives a wrong timeout; new groups can be made afterwards."""
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="expected seconds, more than 0 and at most") as caught:
        probe(timeout_s=timeout_s if rank == 1 else TRY_S)
    assert probe(timeout_s=5 * TRY_S) == "p2p"
    sums = [float(CPContext.from_group(dist.new_group()).all_reduce(torch.ones(())))]
    return f"{type(caught.value).__name__}: {caught.value}", sums


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), "long", True, None])
def test_a_wrong_timeout_on_one_rank_is_refused_on_all(ranks: RankGroup, timeout_s: Any) -> None:
    started = monotonic()
    for rank, (text, sums) in enumerate(ranks.run(wrong_timeout, timeout_s)):
        assert text.startswith("ValueError" if rank == 1 else "RankMismatchError: probe: rank 1: ")
        assert f"got {timeout_s!r}" in text
        assert sums == [4.0]
    assert monotonic() - started < BOUND_S


def other_timeouts(group: dist.ProcessGroup) -> str:
    return probe(timeout_s=5.0 + dist.get_rank())


def test_timeouts_may_differ(ranks: RankGroup) -> None:
    assert ranks.run(other_timeouts) == ["p2p"] * 4


def dies_in_probe(group: dist.ProcessGroup, where: str) -> tuple[str, float]:
    started = monotonic()
    if dist.get_rank() == 1:
        setattr(dist, where, lambda *a, **k: os._exit(17))
    try:
        return probe(timeout_s=TRY_S), 0.0
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", monotonic() - started


@pytest.mark.parametrize("where", ["new_group", "batch_isend_irecv", "all_reduce"])
def test_a_rank_that_dies_ends_the_probe_on_all(own_ranks: RankGroup, where: str) -> None:
    outcomes = own_ranks.outcomes(dies_in_probe, where)
    assert isinstance(outcomes[1], Failure)
    for text, seconds in (outcomes[0], outcomes[2]):
        assert text.startswith("RingError: rank ")
        assert "could not agree on how to exchange messages" in text
        assert seconds < BOUND_S


def cannot_destroy(group: dist.ProcessGroup) -> str:
    right = dist.destroy_process_group
    if dist.get_rank() == 1:
        dist.destroy_process_group = lambda *a, **k: fail("odd", right, a, k)
    try:
        return probe(timeout_s=5 * TRY_S)
    finally:
        dist.destroy_process_group = right


def test_a_trial_group_that_one_rank_cannot_destroy_changes_no_verdict(
    own_ranks: RankGroup,
) -> None:
    assert own_ranks.run(cannot_destroy) == ["p2p"] * 3


def probed_context(group: dist.ProcessGroup) -> bool:
    cp = CPContext.from_group(group, messages="probe")
    return type(cp.transport) is DistributedTransport


def test_a_context_can_probe_for_itself(ranks: RankGroup) -> None:
    assert ranks.run(probed_context) == [True] * 4


def verdict_alone(group: dist.ProcessGroup) -> bool:
    """What each rank would conclude from send and receive without asking the others."""
    if dist.get_rank(group) == 1:
        dist.batch_isend_irecv = lambda ops: fail("raises", None, None, None)
    with probing.contextlib.ExitStack() as after:
        works = probing._try(probing._p2p, TRY_S, after) == ""
        sleep(2 * TRY_S)
        return works


def test_without_the_agreement_ranks_would_choose_differently() -> None:
    group = RankGroup(4, group_timeout_s=3)
    try:
        assert set(group.run(verdict_alone)) == {True, False}
    finally:
        group.close()
