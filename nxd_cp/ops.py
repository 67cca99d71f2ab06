"""The dispatcher ops `nxd_cp::ring_forward` and `nxd_cp::ring_backward`.

Does: give the ring a schema, shapes without data (fake kernels) and a derivative, so that autograd,
`torch.compile` and checkpoint policies see one op. Does not: validate arguments (`validation.py`,
which `attention.py` calls first; only what a backend can compute is asked here) or compute
(`ring.py`).

A context cannot pass the dispatcher, so its handle does; "" stands for one device. The call number
is an output of the forward, so that a backward names the forward it belongs to.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from nxd_cp import ring, strategies
from nxd_cp.backends import get_backend
from nxd_cp.context import CPContext, find_context
from nxd_cp.schedule import Plan, make_plan
from nxd_cp.transport import Call, LocalSession, LocalTransport, RingError
from nxd_cp.transport.agreement import announce_refusal, check_agreement


@torch.library.custom_op("nxd_cp::ring_forward", mutates_args=())
def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    cp: str,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, Hq, S, D] in q's dtype, lse [B, Hq, S] fp32, and the call number (int64, CPU).

    cp: handle of a context, "" for one device. backend: a name that is not "auto".
    """
    context = _context(cp)
    plan = plan_for(context, q.shape[2], causal, window)
    work = _carry_out(plan, q, k, v, context, backend)
    with context.transport.call("forward") as call:
        _agree(
            call,
            context,
            q,
            k,
            segment_ids,
            causal,
            window,
            scale,
            backend,
            forward_call=call.number,
        )
        o, lse = strategies.forward(
            q,
            k,
            v,
            work=work,
            rank=context.rank,
            backend=get_backend(backend, q.device),
            call=call,
            scale=scale,
            document_ids=_gather_ids(call, segment_ids, plan, context.rank),
        )
    return _rows_first(o.to(q.dtype)), lse.contiguous(), torch.tensor(call.number)


@torch.library.custom_op("nxd_cp::ring_backward", mutates_args=())
def ring_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    o: Tensor,
    lse: Tensor,
    forward_call: Tensor,
    cp: str,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k and v."""
    context = _context(cp)
    plan = plan_for(context, q.shape[2], causal, window)
    number = int(forward_call)
    with context.transport.call("backward") as call:
        _agree(
            call, context, q, k, segment_ids, causal, window, scale, backend, forward_call=number
        )
        dq, dk, dv = strategies.backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            work=strategies.plan_for(context.strategy, plan, q, k),
            rank=context.rank,
            backend=get_backend(backend, q.device),
            call=call,
            scale=scale,
            document_ids=_gather_ids(call, segment_ids, plan, context.rank),
        )
        # dk and dv lie in a message buffer; an op returns memory of its own.
        dq = _rows_first(dq.to(q.dtype))
        return dq, dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@ring_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    cp: str,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    o = _rows_first(q.new_empty(q.shape))
    return o, lse, torch.empty((), dtype=torch.int64, device="cpu")


@ring_backward.register_fake
def _backward_fake(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    o: Tensor,
    lse: Tensor,
    forward_call: Tensor,
    cp: str,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_first(q.new_empty(q.shape)), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, segment_ids, *ctx.options = inputs
    o, lse, forward_call = output
    handle = ctx.options[0]
    ctx.context = find_context(handle) if handle else None  # stays alive until the backward
    ctx.mark_non_differentiable(lse, forward_call)
    ctx.save_for_backward(q, k, v, segment_ids, o, lse, forward_call)


def _differentiate(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = ring_backward(do, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, *[None] * len(ctx.options))


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "ring_attention: expected first derivatives only, got a request to differentiate its "
        "backward; double backward is not supported"
    )


ring_forward.register_autograd(_differentiate, setup_context=_save)
ring_backward.register_autograd(_refuse)


def plan_for(context: CPContext, local_len: int, causal: bool, window: int | None = None) -> Plan:
    """The plan of a context for `local_len` tokens per rank."""
    return make_plan(
        context.layout,
        context.size,
        local_len * context.size,
        causal=causal,
        window=window,
        ring_order=context.ring_order,
    )


def _gather_ids(
    call: Call, segment_ids: Tensor | None, plan: Plan, rank: int
) -> list[Tensor] | None:
    return None if segment_ids is None else ring.gather(call, segment_ids.long(), plan, rank)


def refuse(context: CPContext, reason: str, device: torch.device) -> None:
    """Tell the other ranks, which are about to agree on a forward, that this one cannot begin.

    When nobody listens there is nobody to tell, and the caller's own error is the one to raise.
    """
    if context.size > 1 and context.check_ranks and not torch.compiler.is_compiling():
        with contextlib.suppress(RingError), context.transport.call("forward") as call:
            announce_refusal(call, context.ring_order, reason, device)


def _carry_out(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, context: CPContext, backend: str
) -> strategies.StrategyPlan:
    """The plan by the context's strategy, of which the backend can compute every rectangle.

    Here and not earlier, because a compiled graph begins here.
    """
    try:
        work = strategies.plan_for(context.strategy, plan, q, k)
        get_backend(backend, q.device).validate(q, k, v, plan=work.plan, rank=context.rank)
        return work
    except ValueError as error:
        refuse(context, str(error), q.device)
        raise


def _rows_first(x: Tensor) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as models use it and flash returns it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _context(handle: str) -> CPContext:
    if handle:
        return find_context(handle)
    return CPContext(LocalTransport(0, LocalSession(1, timeout_s=0.0)))


def _agree(
    call: Call,
    context: CPContext,
    q: Tensor,
    k: Tensor,
    segment_ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
    *,
    forward_call: int,
) -> None:
    """All ranks must be in the same call, with the same arguments."""
    if context.size == 1 or not context.check_ranks:
        return
    batch, num_heads, local_len, head_dim = q.shape
    description: dict[str, str | int | float] = {
        "call": f"{call.kind} {call.number}",
        "of forward call": forward_call,
        "batch": batch,
        "query heads": num_heads,
        "key/value heads": k.shape[1],
        "local sequence length": local_len,
        "head dim": head_dim,
        "dtype": str(q.dtype),
        "device": q.device.type,
        "causal": causal,
        "window": str(window),
        "segment_ids": "None" if segment_ids is None else "given",
        "scale": scale,
        "backend": backend,
        "layout": context.layout,
        "strategy": str(context.strategy),
        "ring order": str(context.ring_order),
    }
    check_agreement(call, context.ring_order, description, q.device)
