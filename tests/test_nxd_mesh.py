"""NxD's groups, rings and ranks: as integers, over gloo, and against NxD's own file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from nxd_stand_ins import ParallelState, clone, closed_ring, real_module
from ranks import RankGroup

from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd import check_sizes, context_groups, tensor_groups
from nxd_cp.integrations.nxd.attention import nki_ring_attn_func
from nxd_cp.integrations.nxd.state import check_ring

# (world, tp, cp, pp, chip, lnc)
MESHES = [
    (4, 2, 2, 1, "trn1", 1),
    (8, 2, 2, 2, "trn1", 1),
    (32, 8, 4, 1, "trn1", 1),
    (64, 32, 2, 1, "trn1", 1),
    (128, 8, 4, 2, "trn1", 1),
    (16, 4, 1, 1, "trn2", 2),
    (64, 32, 2, 1, "trn2", 2),
    (128, 32, 4, 1, "trn2", 2),
    (128, 32, 2, 2, "trn2", 2),
    (128, 64, 2, 1, "trn2", 1),
    (64, 16, 4, 1, "trn2", 2),
    (32, 32, 1, 1, "trn2", 2),
]


def test_tensor_parallelism_is_innermost_and_context_comes_next() -> None:
    assert context_groups(4, 2, 2) == [[0, 2], [1, 3]]
    assert context_groups(8, 2, 2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert context_groups(32, 8, 4)[7] == [7, 15, 23, 31]
    assert context_groups(64, 32, 2)[:2] == [[0, 32], [1, 33]]
    assert context_groups(2, 2, 1) == [[0], [1]]


def test_groups_that_pair_the_rows_of_a_trn2_node_do_not_ascend() -> None:
    found = context_groups(64, 32, 2, chip="trn2", lnc=2)
    assert found[:2] == [[0, 16], [1, 17]]
    assert [48, 32] in found
    found = context_groups(128, 32, 4, chip="trn2", lnc=2)
    assert [0, 16, 64, 80] in found
    assert [48, 32, 112, 96] in found
    (whole,) = tensor_groups(64, 64, chip="trn2", lnc=1)
    assert whole == [*range(16), *range(48, 64), *range(16, 48)]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"tensor_parallel_size": 4, "context_parallel_size": 2}, "no TP = 4 with CP = 2 on trn1"),
        ({"tensor_parallel_size": 3, "context_parallel_size": 2}, "a multiple of TP x CP x PP"),
        ({"tensor_parallel_size": 0, "context_parallel_size": 2}, "expected at least 1"),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2, "chip": "gpu"}, "chip: expected"),
    ],
)
def test_sizes_that_nxd_cannot_group_are_refused_with_the_reason(
    sizes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_sizes(world_size=32, **sizes)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_groups_are_those_of_nxds_own_file(mesh: tuple[Any, ...]) -> None:
    world, tp, cp, pp, chip, lnc = mesh
    with real_module(clone(), "parallel_layers.parallel_state", chip) as nxd, _world(world):
        groups = nxd.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            lnc_size=lnc,
            mesh_only=True,
        )
    assert tensor_groups(world, tp, chip=chip, lnc=lnc) == groups.tp_groups
    assert context_groups(world, tp, cp, chip=chip, lnc=lnc) == groups.cp_groups


def test_nxds_own_file_fails_where_we_refuse() -> None:
    with (
        real_module(clone(), "parallel_layers.parallel_state") as nxd,
        _world(64),
        pytest.raises(RuntimeError, match="is invalid"),
    ):
        nxd.initialize_model_parallel(4, context_parallel_size=2, mesh_only=True)


def _world(size: int) -> Any:
    return mock.patch.multiple(
        dist,
        is_initialized=lambda: True,
        get_rank=lambda group=None: 0,
        get_world_size=lambda group=None: size,
    )


def describe(group: dist.ProcessGroup, rings: list[list[int]] | None) -> tuple[Any, ...]:
    """Rank, ring order, gathered global ranks, and how parallel_state was asked."""
    state = ParallelState()
    with pytest.raises(ValueError, match=r"groups to exist, got: context .* TP = 4"):
        CPContext.from_nxd(parallel_state=state)
    state.initialize_model_parallel(tensor=2, context=2, rings=rings)
    state.calls.clear()
    cp = CPContext.from_nxd(layout="striped", parallel_state=state)
    check_ring(cp, dist.get_rank(), state.get_context_model_parallel_src_tgt_pairs())
    gathered = [int(x) for x in cp.all_gather(torch.tensor(dist.get_rank()))]
    return cp.rank, cp.ring_order, cp.layout, gathered, sorted(set(state.calls))


CALLS = [
    "get_context_model_parallel_group",
    "get_context_model_parallel_replica_groups",
    "get_context_model_parallel_size",
]


def test_from_nxd_joins_ranks_0_and_2_with_tp_2(ranks: RankGroup) -> None:
    found = ranks.run(describe, None)
    assert found == [
        (0, (0, 1), "striped", [0, 2], CALLS),
        (0, (0, 1), "striped", [1, 3], CALLS),
        (1, (0, 1), "striped", [0, 2], CALLS),
        (1, (0, 1), "striped", [1, 3], CALLS),
    ]


def test_the_ring_follows_nxds_list_and_the_chunk_the_rank_in_the_group(ranks: RankGroup) -> None:
    found = ranks.run(describe, [[2, 0, 3, 1]])
    assert [rank for rank, *_ in found] == [0, 1, 2, 3]
    assert {order for _, order, *_ in found} == {(2, 0, 3, 1)}


def initialise_nxd(group: dist.ProcessGroup, root: Path) -> tuple[Any, ...]:
    """A context from NxD's own parallel_state, its groups made over gloo."""
    with real_module(root, "parallel_layers.parallel_state") as nxd:
        nxd.initialize_model_parallel(2, context_parallel_size=2)
        cp = CPContext.from_nxd(parallel_state=nxd)
        check_ring(cp, dist.get_rank(), nxd.get_context_model_parallel_src_tgt_pairs())
        return cp.rank, cp.size, [int(x) for x in cp.all_gather(torch.tensor(dist.get_rank()))]


def test_from_nxd_reads_nxds_own_parallel_state(ranks: RankGroup) -> None:
    found = ranks.run(initialise_nxd, clone())
    assert found == [(0, 2, [0, 2]), (0, 2, [1, 3]), (1, 2, [0, 2]), (1, 2, [1, 3])]


def _on_xla(rings: list[list[int]], rank: int, layout: str) -> CPContext:
    """`from_nxd` where the backend says that it is XLA's."""
    state = mock.Mock()
    state.get_context_model_parallel_replica_groups.return_value = rings
    (ring,) = (ring for ring in rings if rank in ring)
    state.get_context_model_parallel_size.return_value = len(ring)
    xla_model = SimpleNamespace(collective_permute=None)
    with (
        mock.patch.multiple(
            dist,
            get_process_group_ranks=lambda group: sorted(ring),
            get_rank=lambda: rank,
            get_backend=lambda group: "xla",
        ),
        mock.patch.dict("sys.modules", {"torch_xla": mock.Mock(), "torch_xla.core": mock.Mock()}),
        mock.patch.dict("sys.modules", {"torch_xla.core.xla_model": xla_model}),
    ):
        return CPContext.from_nxd(layout=layout, parallel_state=state)


def test_on_xla_the_permutes_have_the_pairs_of_every_group() -> None:
    cp = _on_xla([[0, 2], [1, 3]], 3, "zigzag")
    assert (cp.rank, cp.size) == (1, 2)
    assert sorted(cp.transport.pairs) == [[0, 2], [1, 3], [2, 0], [3, 1]]
    check_ring(cp, 3, [(1, 3), (3, 1)])


def test_on_xla_a_ring_that_does_not_ascend_is_not_contiguous() -> None:
    assert _on_xla([[0, 1], [3, 2]], 3, "zigzag").rank == 0
    with pytest.raises(ValueError, match="ring does not"):
        _on_xla([[0, 1], [3, 2]], 3, "contiguous")


@pytest.mark.parametrize(
    ("rank_id", "pairs"),
    [
        (0, [(0, 1), (1, 2)]),
        (0, [(0, 2), (2, 1), (1, 0)]),
        (1, closed_ring([0, 1, 2])),
        (0, closed_ring([0, 1, 2, 3])),
        (0, [(0, 1), (1, 0), (2, 2)]),
        (5, closed_ring([0, 1, 2])),
    ],
)
def test_another_ring_than_the_contexts_is_caught(rank_id: int, pairs: Any) -> None:
    def work(cp: CPContext) -> None:
        if cp.rank == 0:
            check_ring(cp, 0, closed_ring([0, 1, 2]))
            with pytest.raises(ValueError, match="expected the ring"):
                check_ring(cp, rank_id, pairs)

    CPContext.local(3).run(work)


def test_a_group_that_contradicts_its_replica_groups_is_caught() -> None:
    state = mock.Mock()
    state.get_context_model_parallel_replica_groups.return_value = [[0, 1], [2, 3]]
    with (
        mock.patch.object(dist, "get_process_group_ranks", return_value=[0, 2]),
        mock.patch.object(dist, "get_rank", return_value=0),
        pytest.raises(ValueError, match="expected one replica group with the ranks"),
    ):
        CPContext.from_nxd(parallel_state=state)


def test_without_nxd_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"neuronx-distributed to be installed.*from_mesh"):
        CPContext.from_nxd()


def test_another_ring_on_one_rank_alone_is_caught_on_all() -> None:
    def work(cp: CPContext) -> str:
        x = torch.ones(1, 1, 4, 16)
        claimed = 0 if cp.rank == 1 else cp.rank
        with pytest.raises(ValueError, match="rank_id and src_tgt_pairs: expected") as caught:
            nki_ring_attn_func(x, x, x, claimed, closed_ring([0, 1, 2]), cp=cp)
        return str(caught.value)

    group = CPContext.local(3, layout="contiguous", timeout_s=20)
    for rank, text in enumerate(group.run(work)):
        assert ("rank 1 refuses: " in text) == (rank != 1)
