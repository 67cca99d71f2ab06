"""Autocast, checkpointing, compilation, determinism and large logits: one device and rings."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import assert_within_budget
from cases import Case, cut, inputs, join
from ranks import RankGroup
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nxd_cp import CPContext, keep_attention, ops, reference, ring_attention
from nxd_cp.schedule import LAYOUTS, make_plan

BF16 = torch.bfloat16
CPU_BF16 = {"device_type": "cpu", "dtype": BF16}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"window": 5},
    {"window": (3, 2), "causal": False},
    {"cu_seqlens": torch.tensor([0, 5, 16])},
]


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, h, 16, 16).to(dtype).requires_grad_() for h in (4, 2, 2)]


# Autocast


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_casts_the_inputs_and_nothing_else(options: dict[str, Any]) -> None:
    q, k, v = qkv()
    expected = ring_attention(*(x.to(BF16) for x in (q, k, v)), **options)
    wanted = torch.autograd.grad(expected.sum(), (q, k, v))
    with torch.autocast(**CPU_BF16):
        o, lse = ring_attention(q, k.to(BF16), v, return_lse=True, **options)
        found = torch.autograd.grad(o.sum(), (q, k, v))  # also a backward within the region
    assert (o.dtype, lse.dtype) == (BF16, torch.float32)
    assert torch.equal(o, expected)
    assert all(x.dtype == torch.float32 for x in found)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_autocast_that_reaches_the_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_without_autocast", lambda q: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        test_autocast_casts_the_inputs_and_nothing_else({"softcap": 3.0})


def test_without_autocast_mixed_dtypes_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="k: expected dtype and device of q"):
        ring_attention(q, k.to(BF16), v)


# Checkpointing


def block(x: Tensor, cp: CPContext | None) -> Tensor:
    """What a layer does round attention."""
    q, k, v = (x * factor for factor in (1.0, 0.5, 2.0))
    return torch.nn.functional.gelu(ring_attention(q, k, v, cp=cp)).square()


def trained(cp: CPContext, how: str) -> tuple[Tensor, int]:
    """The gradient of x, and the number of messages that took."""
    generator = torch.Generator().manual_seed(cp.rank)
    x = torch.randn(1, 2, 8, 16, generator=generator).requires_grad_()
    if how == "not":
        y = block(x, cp)
    else:
        context_fn = {"context_fn": keep_attention} if how == "keep_attention" else {}
        y = checkpoint(block, x, cp, use_reentrant=how == "reentrant", **context_fn)
    y.sum().backward()
    assert x.grad is not None
    return x.grad, cp.transport.counters.ring_messages


def test_checkpointing_with_the_policy_skips_the_forward_ring() -> None:
    plan = make_plan("zigzag", 3, 24)
    sizes = {"batch": 1, "num_kv_heads": 2, "head_dim": 16, "itemsize": 4}
    traffic = plan.traffic(0, **sizes)
    once = traffic.forward_messages + traffic.backward_messages
    found = {
        how: CPContext.local(3).run(lambda cp, how=how: trained(cp, how))
        for how in ("not", "plain", "reentrant", "keep_attention")
    }
    assert [n for _, n in found["not"]] == [once] * 3
    for how in ("plain", "reentrant"):
        assert [n for _, n in found[how]] == [once + traffic.forward_messages] * 3
    assert [n for _, n in found["keep_attention"]] == [once] * 3
    for how in ("plain", "reentrant", "keep_attention"):
        for (grad, _), (expected, _) in zip(found[how], found["not"], strict=True):
            assert torch.equal(grad, expected)


def over_gloo(group: dist.ProcessGroup, how: str) -> tuple[Tensor, int]:
    return trained(CPContext.from_group(group), how)


def test_processes_skip_it_too(ranks: RankGroup) -> None:
    kept, expected = (ranks.run(over_gloo, h, num_ranks=2) for h in ("keep_attention", "not"))
    for (grad, number), (wanted, once) in zip(kept, expected, strict=True):
        assert torch.equal(grad, wanted)
        assert number == once


# Compilation


def check_compiled(loss: Any, tensors: list[Tensor], **how: Any) -> None:
    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, **how)
    found = torch.autograd.grad(compiled(*tensors), tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_compiles_without_a_graph_break(options: dict[str, Any]) -> None:
    sinks = torch.randn(4, requires_grad=True)

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return ring_attention(q, k, v, sinks=sinks, **options).square().sum()

    check_compiled(loss, [*qkv(), sinks])


def test_it_compiles_under_autocast_and_for_several_lengths() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(**CPU_BF16):
            return ring_attention(q, k, v, seq_len=13).float().square().sum()

    check_compiled(loss, qkv())
    compiled = torch.compile(
        lambda x: ring_attention(x, x, x).sum(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length in (8, 12, 30):
        x = torch.randn(1, 2, length, 16)
        assert torch.equal(compiled(x), ring_attention(x, x, x).sum())


def compiled_ring(group: dist.ProcessGroup, options: dict[str, Any]) -> bool:
    cp = CPContext.from_group(group, layout="striped")
    sinks = torch.randn(4, requires_grad=True)

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return ring_attention(q, k, v, cp=cp, sinks=sinks, **options).square().sum()

    check_compiled(loss, [*qkv(), sinks])
    return True


def test_a_ring_with_options_compiles_without_a_graph_break(ranks: RankGroup) -> None:
    options = {"cu_seqlens": torch.tensor([0, 5, 27]), "seq_len": 27, "softcap": 4.0, "window": 9}
    assert ranks.run(compiled_ring, options, num_ranks=2) == [True, True]


def compiled_gradient(x: Tensor, cp: CPContext | None) -> Tensor:
    def loss(x: Tensor) -> Tensor:
        kept = {"use_reentrant": False, "context_fn": keep_attention}
        return checkpoint(block, x, cp, **kept).sum()

    x = x.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager_decomp_partition", fullgraph=True)(x).backward()
    assert x.grad is not None
    return x.grad


def compiled_checkpoint(group: dist.ProcessGroup) -> tuple[Tensor, int]:
    cp = CPContext.from_group(group)
    _, once = trained(cp, "not")
    cp.transport.counters.reset()
    found = compiled_gradient(cut(whole_x(), Case(S=16), cp.rank), cp)
    return found, cp.transport.counters.ring_messages - once


def whole_x() -> Tensor:
    return torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(3))


def test_a_compiled_checkpoint_skips_the_forward_ring(ranks: RankGroup) -> None:
    """Its gradient is as good as that of one device, compiled as well, against fp64."""
    found = ranks.run(compiled_checkpoint, num_ranks=2)
    assert [number for _, number in found] == [0, 0]
    x = whole_x().double().requires_grad_()
    q, k, v = (x * factor for factor in (1.0, 0.5, 2.0))
    o, _ = reference.attention(q, k, v, mask="causal", scale=0.25)
    torch.nn.functional.gelu(o).square().sum().backward()
    dx = join([part for part, _ in found], Case(S=16))
    assert_within_budget("dx", dx, x.grad, compiled_gradient(whole_x(), None))


def graph_of_a_rank(group: dist.ProcessGroup) -> str:
    """The traced code, with a common name for the context."""
    cp, codes = CPContext.from_group(group), []

    def keep(traced: torch.fx.GraphModule, _: Any) -> Any:
        codes.append(traced.code.replace(repr(cp.handle), "cp"))
        return traced.forward

    torch.compile(lambda *x: ring_attention(*x, cp=cp, window=9), backend=keep)(*qkv())
    (code,) = codes
    return code


def test_all_ranks_trace_the_same_graph(ranks: RankGroup) -> None:
    """NxD: a rank that is baked into the graph is one program per rank."""
    code, *others = ranks.run(graph_of_a_rank, num_ranks=3)
    assert "ring_forward" in code
    assert all(other == code for other in others)


# Large logits


@pytest.mark.parametrize("options", [{}, {"window": 11}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_thirty_thousand_are_those_of_fp64(layout: str, options: dict[str, Any]) -> None:
    """Outputs and gradients; where one key takes all, gradients of the scores vanish."""
    case = Case(layout=layout, size=4, S=48, **options)
    q, k, v, do = inputs(case)
    q = q * (3e4 / float((q[:, :2] @ k.transpose(-1, -2)).abs().max()))
    sinks = torch.linspace(-3e4, 3e4, case.Hq) if case.sinks else None

    def work(cp: CPContext) -> tuple[Tensor, ...]:
        leaves = [cut(x, case, cp.rank).requires_grad_() for x in (q, k, v)]
        o = ring_attention(*leaves, cp=cp, scale=1.0, window=case.window, sinks=sinks)
        o.backward(cut(do, case, cp.rank))
        return (o.detach(), *(x.grad for x in leaves))

    by_rank = CPContext.local(4, layout=layout).run(work)
    found = [join(list(parts), case) for parts in zip(*by_rank, strict=True)]
    truth, baseline = (
        exact(dtype, q, k, v, do, case.hidden(), sinks) for dtype in (torch.float64, torch.float32)
    )
    for name, x, y, z in zip(("o", "dq", "dk", "dv"), found, truth, baseline, strict=True):
        assert torch.isfinite(x).all()
        assert_within_budget(name, x, y, z)


def exact(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    hidden: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """o, dq, dk, dv by the reference, in this dtype."""
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    options: dict[str, Any] = {"mask": hidden, "scale": 1.0}
    options["sinks"] = None if sinks is None else sinks.to(dtype)
    o, _ = reference.attention(q, k, v, **options)
    return (o, *reference.attention_backward(do, q, k, v, **options)[:3])


# Determinism over processes


def bits(group: dist.ProcessGroup, layout: str) -> bool:
    cp = CPContext.from_group(group, layout=layout)
    runs = []
    for _ in range(2):
        torch.manual_seed(cp.rank)
        leaves, sinks = qkv(), torch.zeros(4, requires_grad=True)
        o = ring_attention(*leaves, cp=cp, sinks=sinks, cu_seqlens=torch.tensor([0, 20, 48]))
        o.square().sum().backward()
        runs.append([o, *(x.grad for x in (*leaves, sinks))])
    return all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_of_processes_are_bitwise_equal(ranks: RankGroup, layout: str) -> None:
    assert ranks.run(bits, layout, num_ranks=3) == [True] * 3
