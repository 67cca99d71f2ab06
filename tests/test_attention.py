"""`ring_attention` as a caller sees it: over gloo and threads, its options, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close, assert_within_budget
from cases import NAMES, Case, cut, inputs, join_all, one_device, one_rank, truth
from ranks import RankGroup
from torch import Tensor

from nxd_cp import ops, reference
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.options import Options
from nxd_cp.schedule import LAYOUTS, make_plan


def over_gloo(group: dist.ProcessGroup, cases: list[Case]) -> list[tuple[Any, ...]]:
    results = []
    for case in cases:
        cp = CPContext.from_group(group, layout=case.layout)
        tensors = one_rank(cp, case)
        counters = cp.transport.counters
        results.append((tensors, counters.ring_messages, counters.ring_bytes))
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_agree_with_fp64_and_send_what_the_schedule_says(
    ranks: RankGroup, size: int
) -> None:
    cases = [
        Case(layout=layout, size=size, causal=causal, S=72, Hq=Hq, Hkv=Hkv, D=D)
        for layout in LAYOUTS
        for causal in (True, False)
        for Hq, Hkv, D in ((3, 3, 16), (6, 3, 64), (8, 1, 80))
    ]
    by_rank = ranks.run(over_gloo, cases, num_ranks=size)
    for case, *results in zip(cases, *by_rank, strict=True):
        found = join_all([tensors for tensors, _, _ in results], case)
        for name, x, y in zip(NAMES, found, truth(case), strict=True):
            assert_close(f"{case} {name}", x, y, FP32_OUTPUT if name == "o" else FP32_GRADIENT)
        plan = make_plan(case.layout, size, case.S, causal=case.causal)
        for rank, (_, messages, size_bytes) in enumerate(results):
            traffic = plan.traffic(
                rank, batch=case.B, num_kv_heads=case.Hkv, head_dim=case.D, itemsize=4
            )
            assert messages == traffic.forward_messages + traffic.backward_messages
            assert size_bytes == traffic.forward_bytes + traffic.backward_bytes


def test_processes_in_bf16_err_as_one_device_does(ranks: RankGroup) -> None:
    case = Case(size=4, S=256, Hq=8, Hkv=2, D=128, dtype=torch.bfloat16)
    by_rank = ranks.run(over_gloo, [case])
    found = join_all([results[0][0] for results in by_rank], case)
    for name, x, y, baseline in zip(NAMES, found, truth(case), one_device(case), strict=True):
        assert_within_budget(f"{case} {name}", x, y, baseline)


# One device


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_context_it_is_plain_attention(causal: bool) -> None:
    q, k, v = heads(2, 6, 17, 16), heads(2, 3, 17, 16), heads(2, 3, 17, 16)
    o, lse = ring_attention(q, k, v, causal=causal, scale=0.3, return_lse=True)
    expected, lse_expected = reference.attention(
        q.double(), k.double(), v.double(), mask="causal" if causal else "full", scale=0.3
    )
    assert_close("o", o, expected, FP32_OUTPUT)
    assert_close("lse", lse, lse_expected, FP32_OUTPUT)


def test_the_scale_is_applied_once_and_defaults_to_the_square_root() -> None:
    q, k, v = (heads(1, 2, 8, 16) for _ in range(3))
    assert torch.equal(ring_attention(q, k, v), ring_attention(q, k, v, scale=0.25))
    doubled = ring_attention(q * 2, k, v, scale=0.25)
    torch.testing.assert_close(ring_attention(q, k, v, scale=0.5), doubled, rtol=0, atol=1e-6)


def test_strided_inputs_and_expanded_gradients_give_the_same_result() -> None:
    case = Case(size=2, S=16, D=16)
    q, k, v, _ = inputs(case)

    def work(cp: CPContext, strided: bool) -> tuple[Tensor, ...]:
        leaves = [cut(x, case, cp.rank) for x in (q, k, v)]
        if strided:
            leaves = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in leaves]
            assert all(x.stride(-1) != 1 for x in leaves)
        leaves = [x.detach().requires_grad_() for x in leaves]
        o = ring_attention(*leaves, cp=cp)
        if strided:
            o.sum().backward()
        else:
            o.backward(torch.ones_like(o))
        return (o.detach(), *(x.grad for x in leaves))

    group = CPContext.local(2)
    plain = group.run(lambda cp: work(cp, False))
    for mine, other in zip(plain, group.run(lambda cp: work(cp, True)), strict=True):
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_only_some_inputs_may_want_gradients() -> None:
    q, k, v = (heads(1, 2, 8, 16) for _ in range(3))
    v.requires_grad_()
    ring_attention(q, k, v).sum().backward()
    assert v.grad is not None
    assert q.grad is k.grad is None
    assert not ring_attention(q, k, v.detach()).requires_grad


def test_the_lse_carries_no_gradient_and_says_so() -> None:
    q, k, v = (heads(1, 2, 8, 16).requires_grad_() for _ in range(3))
    o, lse = ring_attention(q, k, v, return_lse=True)
    assert o.requires_grad
    assert not lse.requires_grad


# What is refused, before any message

GOOD = {"q": heads(1, 4, 8, 16), "k": heads(1, 2, 8, 16), "v": heads(1, 2, 8, 16)}

BAD = [
    ({"q": heads(4, 8, 16)}, "q: expected 4 dims"),
    ({"k": [1]}, "k: expected a torch.Tensor, got list"),
    (
        {"q": heads(1, 4, 8, 16).double()},
        "expected float32, bfloat16 or float16, got torch.float64",
    ),
    ({"k": heads(1, 2, 8, 16, dtype=torch.bfloat16)}, "k: expected dtype and device of q"),
    ({"v": heads(1, 2, 6, 16)}, "k and v: expected equal shapes but"),
    ({"q": heads(1, 4, 8, 8)}, "q and k: expected equal batch and head dim"),
    ({"q": heads(1, 3, 8, 16)}, "key/value heads that divide query heads, got 2 and 3"),
    ({name: heads(1, 2, 0, 16) for name in "qkv"}, "expected no empty dim"),
    ({name: heads(1, 2, 7, 16) for name in "qkv"}, "expected a multiple of 2 .*got 7"),
    ({"scale": float("nan")}, "scale: expected a number from 1e-20 to .*, got nan"),
    ({"scale": 0.0}, "scale: expected a number from 1e-20 to .*, got 0.0"),
    ({"scale": -0.25}, "got -0.25; for a negative scale negate q"),
    ({"scale": "x"}, "scale: expected a number from 1e-20 to .*, got 'x'"),
    ({"scale": True}, "scale: expected a number from 1e-20 to .*, got True"),
    ({"scale": torch.tensor(0.25)}, r"scale: expected a number .*, got tensor\(0.2500\)"),
    ({"causal": None}, "causal: expected True or False, got None"),
    ({"causal": 2}, "causal: expected True or False, got 2"),
    ({"window": 0}, "window: expected a whole number of at least 1 .*, got 0"),
    ({"window": 2.5}, "window: expected a whole number of at least 1 .*, got 2.5"),
    ({"window": True}, "window: expected a whole number of at least 1 .*, got True"),
    ({"window": 4, "causal": False}, "window: expected causal=True with a window of one number"),
    ({"window": (3, 1)}, r"window: expected \(left, 0\) with causal=True, got \(3, 1\)"),
    ({"window": (-1, 0)}, r"window: expected \(left, right\), each at least 0 or None, got \(-1"),
    ({"window": (4,)}, r"window: expected \(left, right\), each at least 0 or None, got \(4"),
    ({"segment_ids": [0, 1]}, "segment_ids: expected an int32 or int64 tensor or None, got list"),
    ({"segment_ids": torch.zeros(1, 8)}, "expected an int32 or int64 tensor or None, got torch.f"),
    ({"segment_ids": torch.zeros(1, 7).long()}, r"segment_ids: expected shape \(1, 8\) on cpu"),
    (
        {"segment_ids": torch.zeros(1, 8).long(), "cu_seqlens": torch.tensor([0, 16])},
        "segment_ids and cu_seqlens: expected at most one of them, got both",
    ),
    ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens: expected an int32 or int64 tensor or"),
    ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected \[documents \+ 1\] cumulative"),
    ({"cu_seqlens": torch.tensor([[0, 16]])}, r"cumulative lengths .*, got shape \(1, 2\)"),
    (
        {"cu_seqlens": torch.tensor([0, 16], device="meta")},
        "on the CPU or where q is, on cpu, got one on meta",
    ),
    ({"k": heads(1, 2, 8, 16).to_sparse()}, "k: expected a dense tensor, got torch.sparse_coo"),
    ({"cu_seqlens": torch.tensor([1, 16])}, "cu_seqlens: expected 0 first and values that never"),
    ({"cu_seqlens": torch.tensor([0, 9, 5, 16])}, r"never fall, got \[0, 9, 5, 16\]"),
    ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens: expected 16 last"),
    (
        {"k": heads(1, 2, 4, 16), "v": heads(1, 2, 4, 16), "cu_seqlens": torch.tensor([0, 16])},
        "cu_seqlens: expected as many keys as queries with packed documents, got 4 and 8 per rank",
    ),
    (
        {"cu_seqlens": torch.tensor([0, 5, 10]), "seq_len": 10, "kv_seq_len": 8},
        "kv_seq_len: expected as many keys as queries with packed documents, got 8 and 10",
    ),
    (
        {"segment_ids": torch.zeros(1, 8).long(), "kv_seq_len": 9},
        "kv_seq_len: expected as many keys as queries with packed documents, got 9 and 16",
    ),
    ({"seq_len": 17}, "seq_len: expected the number of tokens .* from 1 to 16 .*, got 17"),
    ({"seq_len": 0}, "seq_len: expected the number of tokens of the whole sequence, from 1"),
    ({"kv_seq_len": 3.5}, "kv_seq_len: expected the number of tokens .*, got 3.5"),
    ({"sinks": 1.0}, "sinks: expected a float32, bfloat16 or float16 tensor or None, got float"),
    ({"sinks": torch.zeros(2)}, r"sinks: expected shape \(4,\), one per query head, .*got \(2,\)"),
    ({"softcap": "x"}, "softcap: expected a number or None, got 'x'"),
    ({"softcap": -1.0}, "softcap: expected a positive number .*, got -1.0"),
    ({"dropout_p": 0.1}, "dropout_p: expected 0.0, got 0.1"),
    ({"backend": "cuda"}, "backend: expected one of"),
]


def test_a_context_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cp: expected a CPContext or None, got str"):
        ring_attention(*GOOD.values(), cp="world")


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text[:30] for _, text in BAD])
def test_unsupported_arguments_raise_before_keys_or_values_are_sent(
    change: dict[str, Any], text: str
) -> None:
    arguments = {**GOOD, **change}
    q, k, v = (arguments.pop(name) for name in "qkv")

    def work(cp: CPContext) -> int:
        with pytest.raises(ValueError, match=text):
            ring_attention(q, k, v, cp=cp, **arguments)
        return cp.transport.counters.ring_messages

    assert CPContext.local(2).run(work) == [0, 0]


def test_a_forward_mode_derivative_is_refused_and_not_taken_for_zero() -> None:
    x, sinks = heads(1, 2, 8, 16), torch.zeros(2)
    for f, given in (
        (lambda q: ring_attention(q, x, x), x),
        (lambda v: ring_attention(x, x, v), x),
        (lambda s: ring_attention(x, x, x, sinks=s), sinks),
    ):
        with pytest.raises(ValueError, match="without forward-mode derivatives"):
            torch.func.jvp(f, (given,), (torch.ones_like(given),))


def test_a_compiled_call_asks_the_backend_too() -> None:
    x = heads(1, 2, 8, 264)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return ring_attention(x, x, x, backend="simulate")

    with pytest.raises(ValueError, match=r"head dim of at most 256 .*, got 264"):
        compiled(x)


def test_the_op_asks_the_backend_before_keys_or_values_are_sent() -> None:
    x = heads(1, 2, 8, 264)  # a compiled graph begins at the op

    def work(cp: CPContext) -> int:
        asked = Options(cp.handle, True, None, None, 0.25, None, None, None, "simulate", False)
        with pytest.raises(ValueError, match=r"head dim of at most 256 .*, got 264"):
            ops.ring_forward(x, x, x, None, None, None, *asked)
        return cp.transport.counters.ring_messages

    assert CPContext.local(2).run(work) == [0, 0]


@pytest.mark.parametrize("backend", ["torch", "simulate"])
def test_the_smallest_scale_still_masks(backend: str) -> None:
    q, k, v = (heads(1, 2, 128, 16) for _ in range(3))
    o = ring_attention(q, k, v, scale=1e-20, backend=backend)
    mean_so_far = v.double().cumsum(2) / torch.arange(1, 129).view(-1, 1)
    assert_close("o", o, mean_so_far, FP32_OUTPUT)
