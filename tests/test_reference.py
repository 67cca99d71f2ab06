"""The reference itself: against PyTorch's fp64 attention and numerical derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from nxd_cp import reference

MASKS = ("full", "causal", "strict")


def heads(B: int, H: int, S: int, D: int) -> Tensor:
    return torch.randn(B, H, S, D, dtype=torch.float64)


class Attention(torch.autograd.Function):
    """The reference's own forward and backward, for gradcheck."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask = mask
        return reference.attention(q, k, v, mask=mask, scale=0.3)[0]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        gradients = reference.attention_backward(do, *ctx.saved_tensors, mask=ctx.mask, scale=0.3)
        return (*gradients, None)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_are_the_numerical_derivatives(mask: str, kv_heads: int) -> None:
    q, k, v = heads(1, 4, 5, 3), heads(1, kv_heads, 5, 3), heads(1, kv_heads, 5, 3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: Attention.apply(*x, mask), leaves)


def test_swapped_dk_and_dv_is_caught() -> None:
    class Swapped(Attention):
        @staticmethod
        def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
            dq, dk, dv, _ = Attention.backward(ctx, do)
            return dq, dv, dk, None

    leaves = [heads(1, 2, 4, 3).requires_grad_() for _ in range(3)]
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *x: Swapped.apply(*x, "causal"), leaves)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_output_is_pytorch_attention_with_repeated_heads(mask: str) -> None:
    q, k, v = heads(2, 6, 17, 8), heads(2, 3, 17, 8), heads(2, 3, 17, 8)
    o, lse = reference.attention(q, k, v, mask=mask, scale=0.2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=mask == "causal", scale=0.2
    )
    s = q @ k.transpose(-1, -2) * 0.2
    if mask == "causal":
        s = s.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, s.logsumexp(-1), rtol=0, atol=1e-13)


def test_a_row_that_sees_nothing_is_zero_with_lse_minus_infinity() -> None:
    q, k, v = (heads(1, 2, 4, 3) for _ in range(3))
    o, lse = reference.attention(q, k, v, mask="strict", scale=1.0)
    assert torch.equal(o[:, :, 0], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert torch.equal(lse[:, :, 0], torch.full((1, 2), -torch.inf, dtype=torch.float64))
    dq, dk, dv = reference.attention_backward(o, q, k, v, mask="strict", scale=1.0)
    assert torch.equal(dq[:, :, 0], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))


def test_blocks_of_rows_add_up_to_the_whole() -> None:
    q, k, v, do = (heads(1, 2, 6, 3) for _ in range(4))
    o, lse = reference.attention(q, k, v, mask="causal", scale=0.5)
    whole = reference.attention_backward(do, q, k, v, mask="causal", scale=0.5)
    delta = (do * o).sum(-1)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start in (0, 4):
        at = slice(start, start + 4)
        o_part, _ = reference.block_forward(
            q[:, :, at], k, v, mask="causal", scale=0.5, first_row=start
        )
        torch.testing.assert_close(o_part, o[:, :, at], rtol=0, atol=1e-14)
        part = reference.block_backward(
            do[:, :, at],
            q[:, :, at],
            k,
            v,
            lse[:, :, at],
            delta[:, :, at],
            mask="causal",
            scale=0.5,
            first_row=start,
        )
        torch.testing.assert_close(part[0], whole[0][:, :, at], rtol=0, atol=1e-14)
        dk += part[1]
        dv += part[2]
    torch.testing.assert_close(dk, whole[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(dv, whole[2], rtol=0, atol=1e-14)
