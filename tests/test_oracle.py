"""PyTorch's own templated ring attention as an oracle: forward within 4e-7 in fp32, and gradients
as near to fp64 as its own.

It is private and works with whole blocks only, causal or full, equal heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import assert_within_budget
from ranks import RankGroup
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as templated

from nxd_cp import CPContext, reference, ring_attention, shard

BOUND = 4e-7
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def both(
    group: dist.ProcessGroup, layout: str, causal: bool, rotation: str, shape: tuple[int, ...]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, theirs, fp64) for o, dq, dk, dv of this rank."""
    cp = CPContext.from_group(group, layout=layout)
    generator = torch.Generator().manual_seed(4)
    whole = [torch.randn(shape, generator=generator) for _ in range(4)]
    q, k, v, do = (shard(x, cp, dim=2) for x in whole)
    templated._cp_options.enable_load_balance = layout == "zigzag"
    templated.set_rotate_method(rotation)
    scale: dict[str, Any] = {"is_causal": causal, "dropout_p": 0.0, "scale": shape[-1] ** -0.5}
    o, lse, *_ = templated._templated_ring_attention(group, 2, FLASH, q, k, v, **scale)
    grads = templated._templated_ring_attention_backward(
        group, 2, FLASH_BACKWARD, do, "grad_out", q, k, v, o, lse, **scale
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = ring_attention(*leaves, cp=cp, causal=causal)
    ours.backward(do)
    exact: dict[str, Any] = {"mask": "causal" if causal else "full", "scale": scale["scale"]}
    *qkv, d = (x.double() for x in whole)
    truth = [reference.attention(*qkv, **exact)[0], *reference.attention_backward(d, *qkv, **exact)]
    mine = [shard(x, cp, dim=2) for x in truth]
    found = (ours.detach(), *(x.grad for x in leaves))
    return list(zip(found, (o, *grads[:3]), mine, strict=True))


@pytest.mark.parametrize("rotation", ["allgather", "alltoall"])
@pytest.mark.parametrize(
    ("layout", "causal"), [("zigzag", True), ("contiguous", True), ("contiguous", False)]
)
def test_it_agrees_with_the_templated_ring(
    ranks: RankGroup, layout: str, causal: bool, rotation: str
) -> None:
    for rank in ranks.run(both, layout, causal, rotation, (2, 4, 256, 32)):
        for name, (ours, theirs, truth) in zip(("o", "dq", "dk", "dv"), rank, strict=True):
            assert_within_budget(name, ours, truth, theirs)
            if name == "o":
                assert float((ours - theirs).abs().max()) <= BOUND


def test_another_mask_is_caught(ranks: RankGroup) -> None:
    causal = ranks.run(both, "contiguous", True, "allgather", (1, 2, 64, 16))
    full = ranks.run(both, "contiguous", False, "allgather", (1, 2, 64, 16))
    difference = (causal[0][0][0] - full[0][0][1]).abs().max()
    assert float(difference) > 1e3 * BOUND
