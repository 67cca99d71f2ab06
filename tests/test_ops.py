"""The dispatcher ops: schema, fake kernels, derivative, refusal of a second one, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import Tensor

from nxd_cp import ops
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.options import Options


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def options(**change: Any) -> Options:
    plain = Options("", True, None, None, 0.25, None, None, None, "torch", True)
    return plain._replace(**change)


def everything(dtype: torch.dtype) -> tuple[list[Tensor | None], Options]:
    """Every optional argument that goes together: sinks, cu_seqlens, a window, a cap, padding."""
    sinks = torch.randn(4).requires_grad_()
    return [*leaves(dtype), sinks, None, torch.tensor([0, 3, 7])], options(
        left=4, right=0, softcap=3.0, seq_len=7
    )


@pytest.mark.parametrize("all_options", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_pass_pytorchs_own_checks(dtype: torch.dtype, all_options: bool) -> None:
    tensors, asked = [*leaves(dtype), None, None, None], options()
    if all_options:
        tensors, asked = everything(dtype)
    torch.library.opcheck(torch.ops.nxd_cp.ring_forward.default, (*tensors, *asked))
    tensors = [None if x is None else x.detach() for x in tensors]
    results = ops.ring_forward(*tensors, *asked)
    arguments = (torch.randn_like(results[0]), *tensors, *results, *asked)
    torch.library.opcheck(torch.ops.nxd_cp.ring_backward.default, arguments)


def test_the_schema_lists_the_options_in_their_order() -> None:
    for op in (torch.ops.nxd_cp.ring_forward, torch.ops.nxd_cp.ring_backward):
        names = [argument.name for argument in op.default._schema.arguments]
        assert tuple(names[-len(Options._fields) :]) == Options._fields


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
