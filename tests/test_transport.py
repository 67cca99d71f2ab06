"""Calls, hops and messages: over threads, and over gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import GROUP_TIMEOUT_S, RankGroup
from torch import Tensor

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.schedule import HEADER_BYTES, Move
from nxd_cp.transport import (
    Call,
    DistributedTransport,
    LocalSession,
    LocalTransport,
    Parcel,
    RankMismatchError,
    RingError,
    Transport,
)
from nxd_cp.transport.agreement import AGREEMENT_BYTES, check_agreement
from nxd_cp.transport.parcel import POOL_BUFFERS

CPU = torch.device("cpu")


def parcel_of(call: Call, value: float, length: int = 3) -> Parcel:
    parcel = call.parcel("kv", (length,), torch.float32, CPU)
    parcel.payload.fill_(value)
    return parcel


def to_the_right(transport: Transport) -> Move:
    left = (transport.rank - 1) % transport.size
    return Move(to=(transport.rank + 1) % transport.size, source=left, brings=left)


def exchange_twice(transport: Transport) -> list[float]:
    with transport.call("test") as call:
        parcel = parcel_of(call, transport.rank)
        move = to_the_right(transport)
        first = call.start(parcel, move).wait().clone()
        move = Move(move.to, move.source, brings=(transport.rank - 2) % transport.size)
        second = call.start(parcel, move).wait().clone()
    return [float(first[0]), float(second[0])]


def crossed_rings(transport: Transport, length_of_second: int) -> None:
    """Two rings under way at once; rank 0 starts them in the other order."""
    a = transport.call("a")
    b = transport.call("b")
    order = (b, a) if transport.rank == 0 else (a, b)
    hops = []
    for call in order:
        length = 3 if call is a else length_of_second
        parcel = parcel_of(call, 1.0, length)
        hops.append(call.start(parcel, to_the_right(transport)))
    for hop in hops:
        hop.wait()


def gloo_exchange_twice(group: dist.ProcessGroup) -> list[float]:
    return exchange_twice(DistributedTransport(group))


def gloo_crossed(group: dist.ProcessGroup, length_of_second: int) -> None:
    crossed_rings(DistributedTransport(group), length_of_second)


def gloo_collectives(group: dist.ProcessGroup) -> tuple[list[float], Tensor, Tensor]:
    cp = CPContext.from_group(group)
    mine = torch.tensor([float(cp.rank), 1.0])
    total = cp.all_reduce(mine)
    return [float(x[0]) for x in cp.all_gather(mine)], total, mine


def gloo_every_dtype(group: dist.ProcessGroup) -> list[tuple[list[Tensor], Tensor]]:
    cp, found = CPContext.from_group(group), []
    for dtype in DTYPES:
        mine = torch.tensor([[cp.rank], [1]]).to(dtype)
        found.append((cp.all_gather(mine), cp.all_reduce(mine)))
    return [*found, (cp.all_gather(torch.tensor(cp.rank)), cp.all_reduce(torch.tensor(2.0)))]


DTYPES = (torch.int16, torch.int8, torch.bool, torch.bfloat16, torch.complex64, torch.float64)


def test_collectives_take_every_dtype_over_gloo(ranks: RankGroup) -> None:
    for *found, scalar in ranks.run(gloo_every_dtype, num_ranks=2):
        for dtype, (parts, total) in zip(DTYPES, found, strict=True):
            expected = [torch.tensor([[rank], [1]]).to(dtype) for rank in range(2)]
            assert all(torch.equal(x, y) for x, y in zip(parts, expected, strict=True))
            assert torch.equal(total, expected[0] + expected[1])
        assert [int(x) for x in scalar[0]] == [0, 1]
        assert float(scalar[1]) == 4.0


def test_parcels_move_to_the_right_over_threads() -> None:
    found = CPContext.local(3).run(lambda cp: exchange_twice(cp.transport))
    assert found == [[2.0, 1.0], [0.0, 2.0], [1.0, 0.0]]


def test_parcels_move_to_the_right_over_gloo(ranks: RankGroup) -> None:
    assert ranks.run(gloo_exchange_twice, num_ranks=3) == [[2.0, 1.0], [0.0, 2.0], [1.0, 0.0]]
    assert ranks.run(gloo_exchange_twice, num_ranks=2) == [[1.0, 0.0], [0.0, 1.0]]


def test_collectives_are_equal_on_all_ranks_and_keep_their_argument(ranks: RankGroup) -> None:
    for found in ranks.run(gloo_collectives):
        assert found[0] == [0.0, 1.0, 2.0, 3.0]
        assert torch.equal(found[1], torch.tensor([6.0, 4.0]))
        assert found[2][1] == 1.0
    local = CPContext.local(4).run(lambda cp: cp.all_reduce(torch.tensor([float(cp.rank), 1.0])))
    assert all(torch.equal(total, torch.tensor([6.0, 4.0])) for total in local)
    with pytest.raises(ValueError, match="op: expected \"sum\", got 'mean'"):
        CPContext.local(1).run(lambda cp: cp.all_reduce(torch.ones(1), op="mean"))


def test_counters_count_what_was_sent() -> None:
    def work(cp: CPContext) -> tuple[int, int, int]:
        exchange_twice(cp.transport)
        counters = cp.transport.counters
        found = counters.ring_messages, counters.ring_bytes
        counters.reset()
        return *found, counters.ring_bytes

    for found in CPContext.local(2).run(work):
        assert found == (2, 2 * (3 * 4 + HEADER_BYTES), 0)


def test_a_hop_that_nobody_waits_for_raises() -> None:
    def work(cp: CPContext) -> None:
        with cp.transport.call("test") as call:
            call.start(parcel_of(call, 1.0), to_the_right(cp.transport))

    with pytest.raises(RingError, match=r"nobody waited for hop 1; call hop\.wait\(\)"):
        CPContext.local(2).run(work)


def test_after_a_hop_was_left_the_group_says_that_it_cannot_be_used() -> None:
    def work(cp: CPContext) -> None:
        with pytest.raises(RingError, match="nobody waited"), cp.transport.call("test") as call:
            call.start(parcel_of(call, 1.0), to_the_right(cp.transport))
        cp.transport.call("next")

    with pytest.raises(RingError, match=r"cannot be used any more .*nobody waited.*make a new"):
        CPContext.local(2).run(work)


def test_waiting_twice_raises() -> None:
    def work(cp: CPContext) -> None:
        with cp.transport.call("test") as call:
            hop = call.start(parcel_of(call, 1.0), to_the_right(cp.transport))
            hop.wait()
            hop.wait()

    with pytest.raises(RingError, match="wait for a hop once"):
        CPContext.local(2).run(work)


@pytest.mark.parametrize("length", [3, 5])
def test_rings_that_overlap_in_different_order_raise_over_threads(length: int) -> None:
    with pytest.raises(RingError, match="the ranks run their rings in a different order"):
        CPContext.local(2, timeout_s=5).run(lambda cp: crossed_rings(cp.transport, length))


@pytest.mark.parametrize("length", [3, 5])
def test_rings_that_overlap_in_different_order_raise_over_gloo(length: int) -> None:
    group = RankGroup(2, group_timeout_s=GROUP_TIMEOUT_S)
    try:
        for outcome in group.outcomes(gloo_crossed, length):
            assert outcome.kind == "RingError"
            assert "the ranks run their rings in a different order" in outcome.text
    finally:
        group.close()


def test_headers_that_are_verified_late_are_verified() -> None:
    def work(cp: CPContext) -> None:
        cp.transport.verifies_at_once = False
        right = Call._header

        def header(call: Call, hop: object, parcel: Parcel, sender: int, owner: int) -> list[int]:
            return right(call, hop, parcel, sender, owner + (call.kind == "wrong"))

        kind = "wrong" if cp.rank == 0 else "test"
        with cp.transport.call(kind) as call:
            call._header = lambda *args: header(call, *args)
            call.start(parcel_of(call, 1.0), to_the_right(cp.transport)).wait()

    with pytest.raises(RingError, match="expected message 1 of ring call 1"):
        CPContext.local(2).run(work)


def test_large_buffers_are_used_again_and_only_a_few_are_kept() -> None:
    def addresses(cp: CPContext, length: int) -> set[int]:
        with cp.transport.call("test") as call:
            parcels = [call.parcel("kv", (length,), torch.float32, CPU) for _ in range(3)]
            return {parcel.payload.data_ptr() for parcel in parcels} | {
                parcel.spare().data_ptr() + HEADER_BYTES for parcel in parcels
            }

    def work(cp: CPContext) -> None:
        addresses(cp, 3)
        assert len(cp.transport.buffers) == 0, "small buffers are not kept"
        first = addresses(cp, 1 << 15)
        assert len(cp.transport.buffers) == POOL_BUFFERS
        assert first & addresses(cp, 1 << 15)

    CPContext.local(1).run(work)


def test_a_rank_that_returns_early_is_named() -> None:
    def work(cp: CPContext) -> None:
        if cp.rank == 0:
            exchange_twice(cp.transport)

    with pytest.raises(RingError, match="rank 0 waits for rank 1, which has already returned"):
        CPContext.local(2).run(work)


def test_a_rank_that_is_late_ends_the_wait() -> None:
    session = LocalSession(2, timeout_s=0.05)
    transport = LocalTransport(0, session)
    with pytest.raises(RingError, match=r"waited 0.05 s for rank 1"):
        exchange_twice(transport)


def test_agreement_names_each_difference_and_who_gave_it() -> None:
    def work(cp: CPContext) -> str:
        mine = {"head dim": 8, "dtype": "bf16" if cp.rank == 1 else "fp32"}
        with (
            pytest.raises(RankMismatchError) as caught,
            cp.transport.call("test") as call,
        ):
            check_agreement(call, mine)
        counters = cp.transport.counters
        assert counters.ring_messages == 0
        assert counters.size_bytes["agreement"] == 2 * AGREEMENT_BYTES
        return str(caught.value)

    for rank, text in enumerate(CPContext.local(3).run(work)):
        assert "dtype = fp32 on rank 0 and 2, bf16 on rank 1" in text
        assert f"this is rank {rank}" in text
        assert "head dim" not in text


def gloo_two_contexts(group: dist.ProcessGroup, check_ranks: bool) -> None:
    contexts = [CPContext.from_group(group, check_ranks=check_ranks) for _ in range(2)]
    x = torch.randn(1, 2, 4, 16)
    for cp in contexts if contexts[0].rank == 0 else reversed(contexts):
        ring_attention(x, x, x, cp=cp)


@pytest.mark.parametrize("check_ranks", [True, False])
def test_two_contexts_of_one_group_in_a_different_order_raise(check_ranks: bool) -> None:
    group = RankGroup(2, group_timeout_s=GROUP_TIMEOUT_S)
    try:
        for outcome in group.outcomes(gloo_two_contexts, check_ranks):
            assert outcome.kind == "RingError"
            assert "of context 1" in outcome.text
            assert "of context 2" in outcome.text
    finally:
        group.close()
