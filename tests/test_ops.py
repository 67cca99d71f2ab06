"""The dispatcher ops: schema, fake kernels, derivative, refusal of a second one, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import Tensor

from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_op_passes_pytorchs_own_checks(dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.nxd_cp.ring_forward.default, (*leaves(dtype), None, "", True, None, 0.25, "torch")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_op_passes_pytorchs_own_checks(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in leaves(dtype))
    o, lse, number = ops.ring_forward(q, k, v, None, "", True, None, 0.25, "torch")
    torch.library.opcheck(
        torch.ops.nxd_cp.ring_backward.default,
        (torch.randn_like(o), q, k, v, None, o, lse, number, "", True, None, 0.25, "torch"),
    )


def test_a_second_derivative_is_refused_and_says_so() -> None:
    q, k, v = leaves()
    (dq,) = torch.autograd.grad(ring_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


def test_gradients_have_the_dtypes_and_memory_of_their_own() -> None:
    q, k, v = leaves(torch.bfloat16)
    ring_attention(q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16
        assert x.grad.is_contiguous()
        assert x.grad.untyped_storage().nbytes() == x.nbytes


def test_a_backward_after_its_group_was_dropped_still_works() -> None:
    def forward() -> tuple[Tensor, Tensor]:
        q, k, v = leaves()
        group = CPContext.local(1)
        return q, group.run(lambda cp: ring_attention(q, k, v, cp=cp))[0]

    q, o = forward()
    o.sum().backward()
    assert q.grad is not None


def test_it_compiles_without_a_graph_break() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v).square().sum()

    q, k, v = leaves()
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def compiled_ring(group: dist.ProcessGroup) -> list[bool]:
    cp = CPContext.from_group(group)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, cp=cp).square().sum()

    x = leaves()
    expected = torch.autograd.grad(loss(*x), x)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*x), x)
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def test_a_ring_of_processes_compiles_without_a_graph_break(ranks: RankGroup) -> None:
    assert ranks.run(compiled_ring, num_ranks=2) == [[True] * 3] * 2
