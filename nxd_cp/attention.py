"""`ring_attention`, the one call that a model makes.

Does: check the arguments, choose the backend, and call the op. Does not: shard (`sharding.py`),
communicate (`ring.py`) or own a process group (`context.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp import ops
from nxd_cp.backends import get_backend, resolve_backend_name
from nxd_cp.context import CPContext
from nxd_cp.schedule import make_plan
from nxd_cp.validation import (
    refuse_unsupported,
    validate_dropout,
    validate_length,
    validate_scale,
    validate_segment_ids,
    validate_tensors,
    validate_window,
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: CPContext | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the sequence of all ranks, from each rank's part of it. Differentiable once.

    q: [B, Hq, S, D]; k, v: [B, Hkv, S, D], Hkv divides Hq; float32, bfloat16 or float16; S is the
    local length, tokens in the order of the context's layout (see `nxd_cp.shard`).
    cp: the place in a context-parallel group; None is plain attention on one device.
    causal: by global position. window: each query sees that many keys, its own included (causal,
    backend "torch" only); nothing is computed or sent beyond it.
    segment_ids: [B, S], integers; a query sees only keys with its own id (packed documents, of any
    length and wherever they lie; backend "torch" only). They may differ from call to call.
    scale: of the scores, default D ** -0.5.
    backend: "torch", "nki" (kernels on a Neuron device), "simulate" (the same kernels on a CPU) or
    "auto" ("nki" for tensors on a Neuron device, else "torch").
    return_lse: also return the natural logarithm of each row's sum of exponentials, scale included,
    fp32 [B, Hq, S]; it carries no gradient.

    Returns o [B, Hq, S, D] in q's dtype. Accumulation is fp32, rounded once. A row that sees
    nothing has o = 0 and lse = -inf.

    Raises ValueError for arguments that are not supported (sinks, softcap and dropout_p
    are not, in this version); RankMismatchError, a ValueError, when ranks differ or
    another rank refuses its arguments, with its reason. Both before keys or values are sent, and on
    every rank. RingError when a rank is lost or late.
    Source: Ring Attention (arXiv 2310.01889).
    """
    if cp is not None and not isinstance(cp, CPContext):
        raise ValueError(
            f"cp: expected a CPContext or None, got {type(cp).__name__}; make one with "
            "CPContext.from_group"
        )
    try:
        validate_tensors(q, k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        validate_window(window, causal=causal)
        refuse_unsupported(sinks=sinks, softcap=softcap)
        validate_dropout(dropout_p)
        validate_scale(scale)
        name = resolve_backend_name(backend, q.device)
        validate_segment_ids(segment_ids, q, backend=name)
        _validate_plan(q, k, v, cp=cp, causal=causal, window=window, backend=name)
    except ValueError as error:
        if cp is not None:
            ops.refuse(cp, str(error), getattr(q, "device", torch.device("cpu")))
        raise
    handle = "" if cp is None else cp.handle
    o, lse, _ = ops.ring_forward(q, k, v, segment_ids, handle, causal, window, scale, name)
    return (o, lse) if return_lse else o


def _validate_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: CPContext | None,
    causal: bool,
    window: int | None,
    backend: str,
) -> None:
    """The length cuts into the layout's chunks, and the backend can compute the rectangles."""
    local_len = q.shape[2]
    if cp is not None:
        validate_length(local_len, layout=cp.layout, size=cp.size)
    if not torch.compiler.is_compiling():
        plan, rank = make_plan("contiguous", 1, local_len, causal=causal, window=window), 0
        if cp is not None:
            plan, rank = ops.plan_for(cp, local_len, causal, window), cp.rank
        get_backend(backend, q.device).validate(q, k, v, plan=plan, rank=rank)
