"""Contexts: what they know, what they refuse, how local groups run."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch.distributed.device_mesh import init_device_mesh

from nxd_cp.context import CPContext, find_context
from nxd_cp.debugging import debug, debug_enabled


def describe(group: dist.ProcessGroup) -> tuple[object, ...]:
    cp = CPContext.from_group(group, layout="striped", ring_order=(1, 0))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    on_mesh = CPContext.from_mesh(mesh, "cp")
    with pytest.raises(ValueError, match="expected one of the mesh's axes"):
        CPContext.from_mesh(mesh, "tp")
    gathered = on_mesh.all_gather(torch.tensor(dist.get_rank()))
    return cp.rank, cp.size, cp.layout, cp.ring_order, on_mesh.rank, [int(x) for x in gathered]


def describe_all(group: dist.ProcessGroup) -> tuple[object, ...]:
    pair = dist.new_group([3, 1])  # group ranks: 0 is global rank 1, 1 is global rank 3
    if dist.get_rank() not in (1, 3):
        with pytest.raises(ValueError, match="expected a process group that this process is in"):
            CPContext.from_group(pair)
        return ()
    cp = CPContext.from_group(pair)
    return cp.rank, [int(x) for x in cp.all_gather(torch.tensor(dist.get_rank()))]


def on_mesh(group: dist.ProcessGroup) -> tuple[int, str, list[int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    cp = CPContext.from_mesh(mesh, "cp", layout="striped")
    with pytest.raises(ValueError, match="expected one of the mesh's axes"):
        CPContext.from_mesh(mesh, "tp")
    return cp.rank, cp.layout, [int(x) for x in cp.all_gather(torch.tensor(dist.get_rank()))]


def test_a_context_of_a_group_has_group_ranks(ranks: RankGroup) -> None:
    found = ranks.run(describe_all)
    assert found == [(), (0, [1, 3]), (), (1, [1, 3])]


def test_a_context_of_a_mesh_axis_has_the_axis_ranks(ranks: RankGroup) -> None:
    found = ranks.run(on_mesh)
    assert found == [
        (0, "striped", [0, 1]),
        (1, "striped", [0, 1]),
        (0, "striped", [2, 3]),
        (1, "striped", [2, 3]),
    ]


def test_local_contexts_know_their_place_and_results_keep_their_order() -> None:
    group = CPContext.local(3, layout="contiguous", ring_order=(0, 2, 1))
    found = group.run(lambda cp: (cp.rank, cp.size, cp.layout, cp.ring_order))
    assert found == [(rank, 3, "contiguous", (0, 2, 1)) for rank in range(3)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "zag"}, "layout: expected one of contiguous, zigzag, striped, got 'zag'"),
        ({"ring_order": (0, 2)}, "permutation of 0..1"),
        (
            {"strategy": None},
            "strategy: expected a name or a Strategy, got None; the names are ring",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CPContext.local(2, **options)
    with pytest.raises(ValueError, match="size: expected a whole number of at least 1, got 0"):
        CPContext.local(0)


def test_the_first_error_of_a_local_group_is_raised_and_the_group_works_again() -> None:
    group = CPContext.local(3)

    def work(cp: CPContext) -> int:
        if cp.rank == 2:
            raise KeyError("planted")
        return len(cp.all_gather(torch.ones(1)))

    with pytest.raises(KeyError, match="planted"):
        group.run(work)
    assert group.run(lambda cp: len(cp.all_gather(torch.ones(1)))) == [3, 3, 3]


def test_debug_reaches_the_threads_of_a_local_group_and_ends() -> None:
    with debug():
        assert CPContext.local(2).run(lambda cp: debug_enabled()) == [True, True]
        with debug(False):
            assert not debug_enabled()
    assert not debug_enabled()


def test_a_handle_finds_its_context_until_that_is_gone() -> None:
    group = CPContext.local(1)
    handle = group.contexts[0].handle
    assert find_context(handle) is group.contexts[0]
    del group
    gc.collect()
    with pytest.raises(ValueError, match="live CPContext"):
        find_context(handle)


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(2, dtype=torch.int32)], ids=str)
def test_collectives_of_unequal_tensors_raise_on_all_ranks(
    collective: str, other: torch.Tensor
) -> None:
    def work(cp: CPContext) -> str:
        tensor = torch.zeros(2) if cp.rank == 0 else other
        with pytest.raises(ValueError, match="expected the same arguments") as caught:
            getattr(cp, collective)(tensor)
        return str(caught.value)

    for text in CPContext.local(2).run(work):
        assert "(2,) on rank 0" in text or "torch.float32 on rank 0" in text


def gloo_unequal(group: dist.ProcessGroup) -> str:
    cp = CPContext.from_group(group)
    with pytest.raises(ValueError, match="expected the same arguments") as caught:
        cp.all_gather(torch.zeros(2 + cp.rank))
    return str(caught.value)


def test_gloo_collectives_of_unequal_lengths_raise_and_do_not_end_the_process(
    ranks: RankGroup,
) -> None:
    for text in ranks.run(gloo_unequal, num_ranks=2):
        assert "shape = (2,) on rank 0, (3,) on rank 1" in text


def test_a_local_context_outside_run_says_so_at_once() -> None:
    group = CPContext.local(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="used outside `run`"):
            group.contexts[0].all_gather(torch.ones(1))
        assert group.run(lambda cp: len(cp.all_gather(torch.ones(1)))) == [2, 2]


def test_a_local_group_runs_once_at_a_time_and_says_so() -> None:
    group = CPContext.local(2)

    def again(cp: CPContext) -> int:
        if cp.rank == 0:
            with pytest.raises(RuntimeError, match="this local group is running already"):
                group.run(lambda cp: 0)
        return len(cp.all_gather(torch.ones(1)))

    assert group.run(again) == [2, 2]
    assert group.run(lambda cp: cp.rank) == [0, 1]


def test_many_threads_with_groups_of_their_own_do_not_meet() -> None:
    def one(index: int) -> list[float]:
        group = CPContext.local(2)
        return group.run(lambda cp: float(cp.all_reduce(torch.tensor(float(index)))))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(16))) == [[2.0 * index] * 2 for index in range(16)]
