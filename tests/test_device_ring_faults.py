"""Backend "simulate_ring": rank 0 computes for all, so all hear at once what stops it."""

from __future__ import annotations

from time import monotonic

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup

from nxd_cp import device_ring
from nxd_cp.attention import ring_attention
from nxd_cp.backends.kernel_support import SupportKernels
from nxd_cp.context import CPContext
from nxd_cp.simulators import nki_api
from nxd_cp.transport import Call, RingError

BOUND_S = 20.0  # a third of the timeout of the ranks' groups
SHAPE = (1, 2, 8, 16)


def attend(cp: CPContext) -> torch.Tensor:
    q = torch.ones(SHAPE, requires_grad=True)
    o = ring_attention(q, q, q, cp=cp, backend="simulate_ring")
    assert isinstance(o, torch.Tensor)
    return o


def simulation_fails(
    group: dist.ProcessGroup, check_ranks: bool, in_backward: bool
) -> tuple[str, float]:
    """The error of a simulation that fails on rank 0 alone, and seconds until it is known; the
    group works afterwards.
    """
    cp = CPContext.from_group(group, check_ranks=check_ranks)
    o = attend(cp)
    right = nki_api.simulate_ranks
    if cp.rank == 0:
        nki_api.simulate_ranks = lambda *given, **options: fail()
    started = monotonic()
    try:
        with pytest.raises((ZeroDivisionError, ValueError), match="planted") as caught:
            o.sum().backward() if in_backward else attend(cp)
    finally:
        nki_api.simulate_ranks = right
    seconds = monotonic() - started
    attend(cp).sum().backward()
    return f"{type(caught.value).__name__}: {caught.value}", seconds


def fail() -> None:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("check_ranks", [True, False])
def test_what_stops_the_simulation_on_rank_0_all_ranks_hear_at_once(
    ranks: RankGroup, check_ranks: bool, in_backward: bool
) -> None:
    (first, _), *others = ranks.run(simulation_fails, check_ranks, in_backward, num_ranks=3)
    assert first == "ZeroDivisionError: planted"
    for text, seconds in others:
        assert text.startswith("RankMismatchError")
        assert "(simulation): rank 0 refuses: ZeroDivisionError: planted" in text
        assert seconds < BOUND_S


def test_ranks_that_are_gone_when_they_are_told_do_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(call: Call, reason: str) -> None:
        raise RingError("planted too")

    monkeypatch.setattr(nki_api, "simulate_ranks", lambda *given, **options: fail())
    monkeypatch.setattr(device_ring, "announce_refusal", gone)
    with pytest.raises(ZeroDivisionError, match="planted"):
        CPContext.local(2).run(attend)


def preparation_fails(group: dist.ProcessGroup) -> str:
    """Rank 1 fails as it prepares its backward; the group works afterwards."""
    cp = CPContext.from_group(group)
    o = attend(cp)
    right = SupportKernels.row_delta
    if cp.rank == 1:
        SupportKernels.row_delta = lambda *given: fail()
    try:
        with pytest.raises((ZeroDivisionError, ValueError), match="planted") as caught:
            o.sum().backward()
    finally:
        SupportKernels.row_delta = right
    attend(cp).sum().backward()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_what_stops_one_rank_before_its_backward_all_ranks_hear_at_once(ranks: RankGroup) -> None:
    texts = ranks.run(preparation_fails, num_ranks=3)
    assert texts[1] == "ZeroDivisionError: planted"
    assert all("(backward): rank 1 refuses: planted" in texts[rank] for rank in (0, 2))


def test_backwards_in_a_different_order_are_named() -> None:
    def work(cp: CPContext) -> str:
        outputs = [attend(cp) for _ in range(2)]
        with pytest.raises(ValueError, match="expected the same arguments") as caught:
            outputs[1 if cp.rank == 0 else 0].sum().backward()
        return str(caught.value)

    for text in CPContext.local(2).run(work):
        assert "of forward call = " in text
        assert "on rank 0, 1 on rank 1" in text
