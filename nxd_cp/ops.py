"""The dispatcher ops `nxd_cp::ring_forward` and `nxd_cp::ring_backward`.

Does: give the ring a schema, shapes without data (fake kernels) and a derivative, so that autograd,
`torch.compile` and checkpoint policies see one op. Does not: validate arguments (`validation.py`,
which `attention.py` calls first; only what needs the values of a tensor or the plan is asked here)
or compute (`ring.py`).

A context cannot pass the dispatcher, so its handle does; "" stands for one device. The call number
is an output of the forward, so that a backward names the forward it belongs to. The tail of each
argument list is `Options`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from nxd_cp import documents, ring, strategies
from nxd_cp.backends import get_backend
from nxd_cp.context import CPContext, find_context, refusing
from nxd_cp.debugging import call_site, debug_enabled, fingerprint, refuse_nan
from nxd_cp.options import SCHEMA, Options
from nxd_cp.schedule import Plan, make_plan, token_runs
from nxd_cp.strategies import rows_first_like
from nxd_cp.transport import Call, LocalSession, LocalTransport

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? segment_ids, Tensor? cu_seqlens"


@torch.library.custom_op(
    "nxd_cp::ring_forward",
    mutates_args=(),
    schema=f"({_INPUTS}, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, Hq, Sq, Dv] in q's dtype, lse [B, Hq, Sq] fp32, and the call number (int64, CPU)."""
    asked = _Asked(q, k, v, sinks, segment_ids, cu_seqlens, Options(*options))
    with _without_autocast(q), asked.context.transport.call("forward") as call:
        asked.agree(call, forward_call=call.number)
        o, lse = strategies.forward(q, k, v, sinks=sinks, **asked.to_run(call))
    return _rows_first(o.to(q.dtype)), lse.contiguous(), torch.tensor(call.number)


@torch.library.custom_op(
    "nxd_cp::ring_backward",
    mutates_args=(),
    schema=f"(Tensor do, {_INPUTS}, Tensor o, Tensor lse, Tensor forward_call, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def ring_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    forward_call: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks in the dtypes of q, k, v and sinks; dsinks is empty without sinks."""
    asked = _Asked(q, k, v, sinks, segment_ids, cu_seqlens, Options(*options))
    with _without_autocast(q), asked.context.transport.call("backward") as call:
        asked.agree(call, forward_call=int(forward_call))
        dq, dk, dv, dsinks = strategies.backward(
            do, q, k, v, o, lse, sinks=sinks, **asked.to_run(call)
        )
        # dk and dv lie in a message buffer; an op returns memory of its own.
        dk, dv = rows_first_like(k).copy_(dk), rows_first_like(v).copy_(dv)
    if sinks is None or dsinks is None:
        return _rows_first(dq.to(q.dtype)), dk, dv, q.new_empty(0)
    return _rows_first(dq.to(q.dtype)), dk, dv, dsinks.to(sinks.dtype)


@ring_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    o = _rows_first(q.new_empty((*q.shape[:-1], v.shape[-1])))
    return o, lse, torch.empty((), dtype=torch.int64, device="cpu")


@ring_backward.register_fake
def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return _rows_first(q.new_empty(q.shape)), rows_first_like(k), rows_first_like(v), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    o, lse, forward_call = output
    tensors, ctx.options = inputs[:6], inputs[6:]
    handle = Options(*ctx.options).cp
    ctx.context = find_context(handle) if handle else None  # stays alive until the backward
    ctx.mark_non_differentiable(lse, forward_call)
    ctx.save_for_backward(*tensors, o, lse, forward_call)


def _differentiate(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    with refusing(ctx.context, "backward"):
        # Once: under checkpointing, reading them is the recomputation. Here shows what one rank
        # changed in place, or has freed.
        saved = ctx.saved_tensors
    *gradients, dsinks = ring_backward(do, *saved, *ctx.options)
    no_gradient = [None] * (2 + len(ctx.options))
    return (*gradients, None if saved[3] is None else dsinks, *no_gradient)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "ring_attention: expected first derivatives only, got a request to differentiate its "
        "backward; double backward is not supported"
    )


ring_forward.register_autograd(_differentiate, setup_context=_save)
ring_backward.register_autograd(_refuse)


def plan_for(context: CPContext, q_len: int, kv_len: int, options: Options) -> Plan:
    """The plan of a context for `q_len` query slots and `kv_len` key slots per rank."""
    return make_plan(
        context.layout,
        context.size,
        q_len * context.size,
        kv_len=kv_len * context.size,
        num_tokens=options.seq_len,
        num_kv_tokens=options.kv_seq_len,
        causal=options.causal,
        window=(options.left, options.right),
        ring_order=context.ring_order,
    )


class _Asked:
    """One rank's call: what it was given, and what follows from that without communication.

    Raises ValueError, and tells the other ranks, for what the backend cannot compute and for
    cu_seqlens that make no sense; here, because a compiled graph begins here.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        segment_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        options: Options,
    ) -> None:
        self._q, self._k, self._v, self._sinks = q, k, v, sinks
        self._segment_ids, self._cu_seqlens, self._options = segment_ids, cu_seqlens, options
        self.context = _context(options.cp)
        with self.context.refusing("forward"):
            self._backend = get_backend(options.backend, q.device)
            self._plan = plan_for(self.context, q.shape[2], k.shape[2], options)
            documents.validate_values(cu_seqlens, self._plan)
            self._work = strategies.plan_for(self.context.strategy, self._plan, q, k, v)
            if debug_enabled():
                self._refuse_nan()
            packed = segment_ids is not None or cu_seqlens is not None
            self.context.transport.validate(self._work.plan, packed=packed)
            for heads in self._work.rounds:
                self._backend.validate(
                    *_of_heads(q, k, v, heads),
                    plan=self._work.plan,
                    rank=self.context.rank,
                    softcap=options.softcap,
                    documents=packed,
                )

    def _refuse_nan(self) -> None:
        """Padding may hold anything."""
        plan, rank = self._plan, self.context.rank
        runs = token_runs(plan.layout, plan.size, rank, plan.kv_len, plan.num_kv_tokens)
        keys = slice(0, sum(map(len, runs)))
        q = self._q[:, :, : plan.local_tokens[rank]]
        refuse_nan(q=q, k=self._k[:, :, keys], v=self._v[:, :, keys])

    def to_run(self, call: Call) -> dict[str, Any]:
        """The keyword arguments of `ring.forward` and `ring.backward`."""
        plan, rank = self._plan, self.context.rank
        ids = None
        if self._cu_seqlens is not None:
            ids = documents.ids_of_ranks(self._cu_seqlens, plan, self._q.device)
        elif self._segment_ids is not None:
            ids = ring.gather(call, self._segment_ids.long(), plan, rank)
        work = self._work
        if ids is not None and work.groups is None:
            plan = documents.spared(plan, ids)
            work = strategies.plan_for(self.context.strategy, plan, self._q, self._k, self._v)
        return {
            "work": work,
            "rank": rank,
            "backend": self._backend,
            "call": call,
            "scale": self._options.scale,
            "softcap": self._options.softcap,
            "document_ids": ids,
        }

    def agree(self, call: Call, *, forward_call: int) -> None:
        """All ranks must be in the same call, with the same arguments."""
        context, options = self.context, self._options
        if not context.agrees:
            return
        batch, num_heads, q_len, head_dim = self._q.shape
        description: dict[str, str | int | float] = {
            "call": f"{call.kind} {call.number}",
            "of forward call": forward_call,
            "called from": call_site() if debug_enabled() and call.kind == "forward" else "",
            "batch": batch,
            "query heads": num_heads,
            "key/value heads": self._k.shape[1],
            "local sequence length": q_len,
            "local key length": self._k.shape[2],
            "head dim": head_dim,
            "head dim of v": self._v.shape[3],
            "dtype": str(self._q.dtype),
            "device": self._q.device.type,
            "sinks": f"{_given(self._sinks)} {fingerprint(self._sinks)}".strip(),
            "segment_ids": _given(self._segment_ids),
            "cu_seqlens": documents.fingerprint(self._cu_seqlens),
            "gradients": "wanted" if options.differentiable else "not wanted",
        }
        own = ("cp", "differentiable")
        named = {k: str(v) for k, v in options._asdict().items() if k not in own}
        context.agree(call, description | named)


def _of_heads(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one round: its key/value heads, and the query heads that read them."""
    group = q.shape[1] // k.shape[1]
    return q[:, heads.start * group : heads.stop * group], k[:, heads], v[:, heads]


def _given(tensor: Tensor | None) -> str:
    return "None" if tensor is None else "given"


def _rows_first(x: Tensor) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as models use it and flash returns it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _context(handle: str) -> CPContext:
    if handle:
        return find_context(handle)
    return CPContext(LocalTransport(0, LocalSession(1, timeout_s=0.0)))


def _without_autocast(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the fp32 of every block; its cast of the inputs is `attention.py`'s."""
    device_type = q.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
