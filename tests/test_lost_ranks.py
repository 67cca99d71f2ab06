"""Ranks that are late, fail or die: an error on every rank, in bounded time."""

from __future__ import annotations

import os
import threading
import time
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import BOUND_S, GROUP_TIMEOUT_S, Failure, RankGroup
from small_call import attend

from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.transport import LocalTransport, RingError


def fail_on_rank_1(
    group: dist.ProcessGroup, how: str, messages: str = "p2p"
) -> tuple[str, str, float]:
    """Rank 1 fails within its second block; returns the others' first and second error."""
    cp = CPContext.from_group(group, messages=messages)
    attend(cp)
    right, blocks = TorchBackend.forward, iter(range(100))

    def fails(self: TorchBackend, *tensors: Any, **options: Any) -> Any:
        if cp.rank == 1 and next(blocks) == 1:
            if how == "dies":
                os._exit(17)
            if how == "sleeps":
                time.sleep(GROUP_TIMEOUT_S + 2)
            else:
                raise ZeroDivisionError("planted")
        return right(self, *tensors, **options)

    TorchBackend.forward = fails
    started = monotonic()
    texts = []
    for _ in range(2):
        try:
            attend(cp)
            texts.append("")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return *texts, monotonic() - started


@pytest.mark.parametrize("messages", ["p2p", "all_to_all"])
def test_a_killed_rank_ends_in_an_error_on_the_others(own_ranks: RankGroup, messages: str) -> None:
    outcomes = own_ranks.outcomes(fail_on_rank_1, "dies", messages)
    assert isinstance(outcomes[1], Failure)
    assert "17" in outcomes[1].text
    for first, second, seconds in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert "a rank is gone, late, or in another call" in first
        assert "cannot be used any more" in second
        assert seconds < GROUP_TIMEOUT_S + 4


def test_a_late_rank_ends_in_an_error_within_the_timeout(own_ranks: RankGroup) -> None:
    for first, second, seconds in own_ranks.outcomes(fail_on_rank_1, "sleeps"):
        assert first.startswith("RingError")
        assert "cannot be used any more" in second
        assert seconds < 2 * GROUP_TIMEOUT_S + 6


@pytest.mark.parametrize("messages", ["p2p", "all_to_all"])
def test_an_exception_in_one_block_ends_in_an_error_on_all(
    own_ranks: RankGroup, messages: str
) -> None:
    outcomes = own_ranks.outcomes(fail_on_rank_1, "raises", messages)
    assert outcomes[1][0].startswith("ZeroDivisionError: planted")
    for first, second, seconds in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert "cannot be used any more" in second
        assert seconds < GROUP_TIMEOUT_S + 4
    assert "cannot be used any more" in outcomes[1][1]


def ends_its_group(cp: CPContext, why: str) -> None:
    """A call fails, and the next says that the group is of no use."""
    with pytest.raises(RingError, match=why):
        attend(cp)
    with pytest.raises(RingError, match="cannot be used any more"):
        attend(cp)


def test_a_rank_that_is_lost_while_a_hop_is_posted_ends_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(self: LocalTransport, *_: Any) -> None:
        raise RingError("planted")

    monkeypatch.setattr(LocalTransport, "post", lost)
    CPContext.local(2).run(lambda cp: ends_its_group(cp, "planted"))


def test_a_rank_that_is_lost_in_a_hop_of_others_ends_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_post, plain_complete = LocalTransport.post, LocalTransport.complete

    def post(self: LocalTransport, out: Any, into: Any, *rest: Any) -> Any:
        return None if out is into is None else plain_post(self, out, into, *rest)

    def lost(self: LocalTransport, ticket: Any) -> None:
        if ticket is None:
            raise RingError("planted")
        plain_complete(self, ticket)

    monkeypatch.setattr(LocalTransport, "joins_every_hop", True)
    monkeypatch.setattr(LocalTransport, "post", post)
    monkeypatch.setattr(LocalTransport, "complete", lost)
    why = "a hop that carries nothing of this rank: planted"
    CPContext.local(2).run(lambda cp: ends_its_group(cp, why))


def test_an_error_in_a_block_while_no_hop_of_that_rank_is_under_way_ends_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks 0 and 2 share a document, so in step 0 rank 2 neither sends nor receives; in step 1 the
    keys of rank 0 come to it.
    """
    right, ids = TorchBackend.forward, torch.tensor([[5] * 12, [6] * 12, [5] * 12])

    def fails(self: TorchBackend, *tensors: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cp-rank-2":
            raise ZeroDivisionError("planted")
        return right(self, *tensors, **options)

    def work(cp: CPContext) -> str:
        text = ""
        for _ in range(2):
            try:
                attend(cp, segment_ids=ids[cp.rank : cp.rank + 1], trains=False)
            except (ZeroDivisionError, RingError) as error:
                text = str(error)
        return text

    monkeypatch.setattr(TorchBackend, "forward", fails)
    *_, text = CPContext.local(3, layout="contiguous").run(work)
    assert "cannot be used any more" in text
    assert "planted" in text


def lost_in_a_collective(group: dist.ProcessGroup, collective: str) -> list[str]:
    """Rank 1 dies within a collective that its ranks had agreed on; what the others see, twice."""
    cp = CPContext.from_group(group)
    if cp.rank == 1:
        setattr(dist, collective, lambda *arguments, **options: os._exit(17))
    texts = []
    for _ in range(2):
        try:
            getattr(cp, collective)(torch.ones(3))
            texts.append("")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_a_rank_lost_in_a_collective_ends_the_group(own_ranks: RankGroup, collective: str) -> None:
    started = monotonic()
    outcomes = own_ranks.outcomes(lost_in_a_collective, collective)
    for first, second in (outcomes[0], outcomes[2]):
        assert first.startswith("RingError")
        assert f"lost the others in {collective}: a rank is gone, late, or" in first
        assert "cannot be used any more" in second
    assert monotonic() - started < BOUND_S
