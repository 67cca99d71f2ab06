"""Is a kernel right? Asked before its speed is, of the same kernel on a shortened case.

Outputs and gradients against fp64: in bf16 about as good as PyTorch's own flash attention in bf16,
in fp32 within fixed bounds (`nxd_cp.accuracy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nxd_cp import reference
from nxd_cp.accuracy import FP32_GRADIENT, FP32_OUTPUT, error, over_bound, over_budget
from nxd_cp.bench.cases import Case
from nxd_cp.bench.implementations import Implementation, Inputs
from nxd_cp.schedule import MaskKind

NAMES = {"flash_fwd": ("o",), "flash_bwd": ("dq", "dk", "dv")}


@dataclass(frozen=True)
class Check:
    """passed, the case that was run, and a sentence: the largest error, or what is wrong."""

    passed: bool
    case: str
    text: str


def checked_case(case: Case, implementation: Implementation, length: int = 256) -> Case:
    """`case`, shortened to `length` or the least that the implementation takes."""
    return case.shortened(max(length, implementation.least_length))


def check(case: Case, implementation: Implementation, device: str = "cpu") -> Check:
    """Run `case` as it is, with tensors on `device`, and judge what comes out."""
    inputs = make_inputs(case)
    truth, baseline = _truth(case, inputs), _torch_flash(case, inputs)
    try:
        found = implementation.prepare(case, inputs.to(device))()
    except Exception as failure:  # a kernel that does not run has no speed either
        return Check(False, str(case), f"{type(failure).__name__}: {failure}")
    worst = 0.0
    for name, x, expected, plain in zip(NAMES[case.kernel], found, truth, baseline, strict=True):
        x = x.detach().to("cpu")
        if case.dtype == "float32":
            said = over_bound(x, expected, FP32_OUTPUT if name == "o" else FP32_GRADIENT)
        else:
            said = over_budget(x, expected, plain)
        if said:
            return Check(False, str(case), f"{name}: {said}")
        worst = max(worst, error(x, expected).relative_rms)
    return Check(True, str(case), f"relative RMS error {worst:.1e} at {case}")


def make_inputs(case: Case) -> Inputs:
    """Unit variance, on the CPU, always equal for a case; o, lse and delta: the truth, rounded."""
    generator = torch.Generator().manual_seed(5)
    q_shape = (1, case.num_heads, case.queries, case.head_dim)
    k_shape = (1, case.num_kv_heads, case.keys, case.head_dim)
    shapes = (q_shape, k_shape, k_shape, q_shape)
    dtype = getattr(torch, case.dtype)
    q, k, v, do = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    o, lse = reference.attention(
        q.double(), k.double(), v.double(), mask=_mask(case), scale=case.scale
    )
    return Inputs(q, k, v, do, o.float(), lse.float(), (do.double() * o).sum(-1).float())


def _truth(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    q, k, v, do = (t.double() for t in (x.q, x.k, x.v, x.do))
    if case.kernel == "flash_fwd":
        return (reference.attention(q, k, v, mask=_mask(case), scale=case.scale)[0],)
    return reference.attention_backward(do, q, k, v, mask=_mask(case), scale=case.scale)


def _mask(case: Case) -> MaskKind:
    return cast(MaskKind, case.mask)


def _torch_flash(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """PyTorch's flash attention in the case's dtype; strict is causal without the first query."""
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    q, k, v = leaves
    rows, keys = slice(None), slice(None)
    if case.mask == "strict":
        rows, keys = slice(1, None), slice(None, -1)
    o = torch.zeros_like(q)
    o[:, :, rows] = F.scaled_dot_product_attention(
        q[:, :, rows], k[:, :, keys], v[:, :, keys], is_causal=case.mask != "full", enable_gqa=True
    )
    if case.kernel == "flash_fwd":
        return (o.detach(),)
    return torch.autograd.grad(o, leaves, x.do)
