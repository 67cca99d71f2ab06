"""`ring_attention`, the one call that a model makes.

Does: check the arguments, choose the backend, and call the op. Does not: shard (`sharding.py`),
communicate (`ring.py`) or own a process group (`context.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp import ops
from nxd_cp.backends import resolve_backend_name
from nxd_cp.context import CPContext
from nxd_cp.validation import (
    refuse_unsupported,
    validate_causal,
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
    scale: of the scores, positive, default D ** -0.5.
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
        validate_causal(causal)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        validate_window(window, causal=causal)
        refuse_unsupported(sinks=sinks, softcap=softcap)
        validate_dropout(dropout_p)
        validate_scale(scale)
        scale = float(scale)
        name = resolve_backend_name(backend, q.device)
        validate_segment_ids(segment_ids, q, backend=name)
        if cp is not None:
            validate_length(q.shape[2], layout=cp.layout, size=cp.size)
    except ValueError as error:
        if cp is not None:
            ops.refuse(cp, str(error), getattr(q, "device", torch.device("cpu")))
        raise
    handle = "" if cp is None else cp.handle
    o, lse, _ = ops.ring_forward(q, k, v, segment_ids, handle, causal, window, scale, name)
    return (o, lse) if return_lse else o
