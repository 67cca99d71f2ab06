"""Which global ranks NxD puts into which groups, as integers.

Does: the tensor- and context-parallel groups of `initialize_model_parallel`, and refuse what it
cannot do, with the reason. Does not: make process groups.

Note [Order]
    Tensor parallelism is innermost, then context, data, pipeline: with TP 2 and CP 2, ranks 0 and 2
    form a context group, 1 and 3 the other. On trn2, for (LNC 1, TP 64) and (LNC 2, TP 32), a node
    is four rows of chips and a tensor group takes rows 0 and 3, the next rows 1 and 2, because rows
    0 and 2 are not linked. Context groups are then no longer ascending: [48, 32] is one. Its ring
    order is that list; the chunk of a rank is its place in the process group, which torch sorts.

Source: neuronx_distributed/parallel_layers/parallel_state.py, NxD 0.18.0
(aws-neuron/neuronx-distributed@fbac349).
"""

from __future__ import annotations

from nxd_cp.nxd_place import TP4_ON_TRN1

CHIPS = ("trn1", "inf2", "trn2", "trn3")
ROWS_PER_NODE = 4

Groups = list[list[int]]


def check_sizes(
    *,
    world_size: int,
    tensor_parallel_size: int,
    context_parallel_size: int,
    pipeline_parallel_size: int = 1,
    chip: str = "trn1",
) -> None:
    """Raise ValueError for sizes of which NxD makes no groups. Call it before NxD does."""
    if chip not in CHIPS:
        raise ValueError(f"chip: expected one of {', '.join(CHIPS)}, got {chip!r}")
    sizes = (tensor_parallel_size, context_parallel_size, pipeline_parallel_size)
    if min(*sizes, world_size) < 1:
        raise ValueError(f"sizes: expected at least 1, got {sizes} in a world of {world_size}")
    tp, cp, pp = sizes
    if world_size % (tp * cp * pp):
        raise ValueError(
            f"world_size: expected a multiple of TP x CP x PP = {tp} x {cp} x {pp}, "
            f"got {world_size}"
        )
    if chip in ("trn1", "inf2") and tp == 4 and cp > 1:
        raise ValueError(f"expected no TP = 4 with CP = {cp} on {chip}: {TP4_ON_TRN1}")


def tensor_groups(
    world_size: int,
    tensor_parallel_size: int,
    *,
    chip: str = "trn1",
    lnc: int = 1,
    ranks_per_node: int = 64,
) -> Groups:
    """The tensor-parallel groups, in the order in which context groups are made of them.

    ranks_per_node: what torchrun calls LOCAL_WORLD_SIZE; only the rows of a trn2 node ask for it.
    """
    tp = tensor_parallel_size
    if not _by_rows(world_size, tp, chip, lnc):
        return [list(range(start, start + tp)) for start in range(0, world_size, tp)]
    if world_size % ranks_per_node:
        raise ValueError(
            f"world_size: expected whole nodes of {ranks_per_node} ranks, got {world_size}"
        )
    row = ranks_per_node // ROWS_PER_NODE
    groups = []
    for start in range(0, world_size, ranks_per_node):
        rows = [list(range(start + i * row, start + (i + 1) * row)) for i in range(ROWS_PER_NODE)]
        outer, inner = rows[0] + rows[3], rows[1] + rows[2]
        groups += [outer + inner] if ranks_per_node == tp else [outer, inner]
    return groups


def context_groups(
    world_size: int,
    tensor_parallel_size: int,
    context_parallel_size: int,
    *,
    chip: str = "trn1",
    lnc: int = 1,
    ranks_per_node: int = 64,
) -> Groups:
    """The context-parallel groups; each list is in ring order. See Note [Order].

    Raises ValueError as `check_sizes` does.
    """
    check_sizes(
        world_size=world_size,
        tensor_parallel_size=tensor_parallel_size,
        context_parallel_size=context_parallel_size,
        chip=chip,
    )
    tensor = tensor_groups(
        world_size, tensor_parallel_size, chip=chip, lnc=lnc, ranks_per_node=ranks_per_node
    )
    neighbours = range(0, len(tensor), context_parallel_size)
    return [
        list(ring)
        for start in neighbours
        for ring in zip(*tensor[start : start + context_parallel_size], strict=True)
    ]


def _by_rows(world_size: int, tp: int, chip: str, lnc: int) -> bool:
    """Whether NxD pairs the rows of a trn2 node (its "ascending descending" logic)."""
    return chip == "trn2" and ((lnc == 1 and tp == 64) or (lnc == 2 and tp == 32 <= world_size / 2))
