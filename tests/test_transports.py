"""Hops by collectives, by XLA's collective permute; rings in any order of ranks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close
from cases import NAMES, Case, all_ranks_locally, join_all, one_rank, truth
from ranks import RankGroup
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nxd_cp.attention import ring_attention
from nxd_cp.backends.torch_flash import TorchBackend
from nxd_cp.context import CPContext
from nxd_cp.schedule import Move
from nxd_cp.strategies import Strategy
from nxd_cp.transport import XlaTransport


def check_fp32(case: Case, found: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(NAMES, found, truth(case), strict=True):
        assert_close(f"{case} {name}", x, y, FP32_OUTPUT if name == "o" else FP32_GRADIENT)


# Collectives

CASES = [
    Case(size=4, S=48),
    Case(size=3, S=48, layout="striped", causal=False),
    Case(size=4, S=48, layout="contiguous", window=9),
    Case(size=4, S=48, window=9, strategy="gather"),
    Case(size=4, S=48, Hq=8, Hkv=4, strategy=Strategy("heads", ways=2)),
]


def by_collectives(group: dist.ProcessGroup, case: Case) -> tuple[Any, ...]:
    plain = dist.batch_isend_irecv
    dist.batch_isend_irecv = None  # any use of send and receive fails
    try:
        cp = CPContext.from_group(
            group, layout=case.layout, strategy=case.strategy, messages="all_to_all"
        )
        return one_rank(cp, case), cp.transport.counters.ring_bytes
    finally:
        dist.batch_isend_irecv = plain


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_ring_without_send_and_receive_is_bitwise_that_of_threads(
    ranks: RankGroup, case: Case
) -> None:
    outcomes = ranks.run(by_collectives, case, num_ranks=case.size)
    found = join_all([outcome for outcome, _ in outcomes], case)
    assert all(torch.equal(x, y) for x, y in zip(found, all_ranks_locally(case), strict=True))
    check_fp32(case, found)


def test_collectives_count_only_what_the_plan_sends(ranks: RankGroup) -> None:
    case = CASES[2]

    def count(cp: CPContext) -> int:
        one_rank(cp, case)
        return cp.transport.counters.ring_bytes

    expected = CPContext.local(4, layout=case.layout).run(count)
    assert [sent for _, sent in ranks.run(by_collectives, case)] == expected


def test_an_unknown_kind_of_messages_is_refused(ranks: RankGroup) -> None:
    assert ranks.run(unknown_messages, num_ranks=1) == [True]


def unknown_messages(group: dist.ProcessGroup) -> bool:
    with pytest.raises(ValueError, match="messages: expected p2p, all_to_all or"):
        CPContext.from_group(group, messages="pigeon")
    return True


# Rings in any order


def ring_over(group: dist.ProcessGroup, case: Case) -> Any:
    """Two rings, over global ranks 3, 0, 2 in this order, and along a mesh that does not ascend."""
    subset = dist.new_group([3, 0, 2])
    found = None
    if dist.get_rank() in (0, 2, 3):
        cp = CPContext.from_group(subset, ring_order=(2, 0, 1))
        found = (cp.rank, one_rank(cp, case))
    mesh = DeviceMesh("cpu", [[3, 0], [2, 1]], mesh_dim_names=("dp", "cp"))
    cp = CPContext.from_mesh(mesh, "cp")
    peers = [int(x) for x in cp.all_gather(torch.tensor(dist.get_rank()))]
    return found, cp.ring_order, peers


def test_global_ranks_need_not_ascend_along_the_ring(ranks: RankGroup) -> None:
    case = Case(size=3)
    outcomes = ranks.run(ring_over, case)
    by_rank = dict(found for found, _, _ in outcomes if found is not None)
    check_fp32(case, join_all([by_rank[rank] for rank in range(3)], case))
    assert [rest for _, *rest in outcomes] == [
        [(1, 0), [0, 3]],
        [(1, 0), [1, 2]],
        [(1, 0), [1, 2]],
        [(1, 0), [0, 3]],
    ]


# XLA, against a stub


class World:
    """Stands for XLA: permutes over all global ranks, which are threads, and keeps a record."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=20)
        self.present: dict[int, Tensor] = {}
        self.pairs: list[list[list[int]]] = []
        self.events: list[str] = []

    def permute(self, global_rank: int) -> Any:
        def collective_permute(value: Tensor, pairs: list[list[int]]) -> Tensor:
            if global_rank == 0:
                self.events.append("permute")
            self.present[global_rank] = value.clone()
            self.pairs.append([list(pair) for pair in pairs])
            self.barrier.wait()
            (source,) = [source for source, target in pairs if target == global_rank]
            found = self.present[source]
            self.barrier.wait()
            return found

        return collective_permute


GROUPS = [(3, 0), (1, 2)]


def over_xla(case: Case, world: World, **options: Any) -> list[tuple[Tensor, ...]]:
    """The results of all four global ranks, two rings of two."""
    transports = [XlaTransport(GROUPS, rank, world.permute(rank)) for rank in range(4)]
    contexts = [CPContext(one, check_ranks=False, **options) for one in transports]
    results: dict[int, Any] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = one_rank(contexts[rank], case)
        except ValueError as error:
            results[rank] = error
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results.values():
        if isinstance(found, Exception):
            raise found
    return [results[rank] for rank in range(4)]


@pytest.mark.parametrize("causal", [True, False])
def test_permutes_give_the_ring_and_every_one_lists_the_whole_world(causal: bool) -> None:
    case, world = Case(size=2, causal=causal), World(4)
    found = over_xla(case, world)
    for group in GROUPS:
        check_fp32(case, join_all([found[rank] for rank in group], case))
    assert {str(sorted(pairs)) for pairs in world.pairs} == {"[[0, 3], [1, 2], [2, 1], [3, 0]]"}
    assert len(world.pairs) == 4 * (1 + 1 + 2), "a hop of the forward, three of the backward"


def test_the_permute_is_emitted_before_the_block_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, right = World(4), TorchBackend.forward
    first = []

    def recorded(self: TorchBackend, *tensors: Tensor, **options: Any) -> Any:
        if threading.current_thread() is first[0]:
            world.events.append("compute")
        return right(self, *tensors, **options)

    permute = world.permute

    def noting(rank: int) -> Any:
        def collective_permute(value: Tensor, pairs: list[list[int]]) -> Tensor:
            if rank == 0 and not first:
                first.append(threading.current_thread())
            return permute(rank)(value, pairs)

        return collective_permute

    world.permute = noting
    monkeypatch.setattr(TorchBackend, "forward", recorded)
    over_xla(Case(size=2), world)
    assert world.events[:3] == ["permute", "compute", "compute"]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(size=2, window=5), {}),
        (Case(size=2), {"strategy": "heads"}),
        (Case(size=2), {"strategy": "gather"}),
        (Case(size=2, layout="contiguous"), {"layout": "contiguous"}),
    ],
    ids=["window", "heads", "gather", "contiguous causal"],
)
def test_what_a_permute_cannot_carry_is_refused(case: Case, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="XLA: expected a causal or full ring in group order"):
        over_xla(case, World(4), **options)


def test_packed_documents_are_refused_over_xla() -> None:
    cp = CPContext(XlaTransport([(0, 1)], 0, lambda value, pairs: value), check_ranks=False)
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="XLA: expected a causal or full ring"):
        ring_attention(x, x, x, cp=cp, segment_ids=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([(0, 1), (1, 2)], "expected every global rank from 0 on once"),
        ([(0, 1), (2, 4)], "expected every global rank from 0 on once"),
        ([(0, 1, 2), (3,)], "expected equal sizes"),
    ],
)
def test_groups_that_leave_the_world_incomplete_are_refused(groups: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        XlaTransport(groups, 0, lambda value, pairs: value)


def test_a_context_without_torch_xla_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="expected torch_xla"):
        CPContext.from_xla([(0, 1)], 0)


def test_pairs_of_our_group_alone_are_caught() -> None:
    world = World(4)
    transport = XlaTransport(GROUPS, 0, world.permute(0))
    transport.pairs = [pair for pair in transport.pairs if 0 in pair]
    world.barrier.abort()
    with pytest.raises(threading.BrokenBarrierError):
        transport.post(torch.zeros(1), None, Move(1, 1, brings=1), "kv")
    assert {str(sorted(pairs)) for pairs in world.pairs} != {"[[0, 3], [1, 2], [2, 1], [3, 0]]"}
