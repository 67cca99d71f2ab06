"""A loss whose gradients are exact after NxDOptimizer has averaged them.

NxDOptimizer divides every gradient by the context-parallel size and adds over those ranks, then
averages over data parallelism (ZeRO-1: the same, in its sharding groups). NxD's Llama gives it the
mean over each rank's own labels, and the mean of such means is the mean over tokens only where all
ranks have equally many: the shift alone leaves the last chunk one short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from nxd_cp import loss
from nxd_cp.context import CPContext
from nxd_cp.sharding import IGNORE_INDEX

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_mean_loss(
    per_token: Tensor,
    labels: Tensor,
    cp: CPContext,
    *,
    data_parallel_group: ProcessGroup | None = None,
) -> Tensor:
    """This rank's share of the mean loss over all valid tokens, scaled for NxDOptimizer.

    A collective call. The mean over the context-parallel ranks of what is returned is the loss.

    Args:
        per_token: loss of each token of this rank, any shape.
        labels: as many elements, already shifted; IGNORE_INDEX marks tokens that do not count.
        cp: the context.
        data_parallel_group: NxD's `get_data_parallel_group()` for the mean over the tokens of all
            replicas; None for the mean of each replica's mean, which is what NxD has.

    Returns:
        A scalar, fp32 (fp64 for fp64 input). Raises ValueError when sizes differ.
    """
    share = loss.token_mean_loss(per_token, labels, cp, grad_average_over=cp.size)
    if data_parallel_group is None:
        return share
    count = cp.all_reduce((labels.reshape(-1) != IGNORE_INDEX).sum())
    everywhere = count.clone()
    dist.all_reduce(everywhere, group=data_parallel_group)
    replicas = dist.get_world_size(data_parallel_group)
    return share * (count * replicas) / everywhere.clamp(min=1)
