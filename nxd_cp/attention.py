"""`ring_attention`, the one call that a model makes.

Does: check the arguments, choose the backend, and call the op. Does not: shard (`sharding.py`),
communicate (`ring.py`) or own a process group (`context.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp import device_ring, ops, validation
from nxd_cp.backends import RINGS, resolve_backend_name
from nxd_cp.context import CPContext, refusing
from nxd_cp.options import Options
from nxd_cp.schedule import Window


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: CPContext | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the sequence of all ranks, from each rank's part of it. Differentiable once.

    q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D]; v: [B, Hkv, Skv, Dv]; Hkv divides Hq; float32, bfloat16
    or float16; Sq and Skv are local lengths, tokens in the order of the context's layout (see
    `nxd_cp.shard`). Under autocast q, k and v are cast to its dtype first.
    cp: the place in a context-parallel group; None is plain attention on one device.
    causal: by global position; the last query sees the last key, so with more keys than queries the
    first ones lie before all queries.
    window: a number of keys that each query sees, its own included (causal); or (left, right), how
    many it sees before and after its own, None for all. Nothing is computed or sent beyond it.
    segment_ids: [B, Sq], integers, of this rank's tokens; a query sees only keys with its own id
    (packed documents, of any length and wherever they lie). They may differ from call to call.
    cu_seqlens: the same for documents that follow each other: [documents + 1] integers, 0 first,
    cumulative lengths in the whole sequence, equal on all ranks and for all rows of the batch.
    seq_len, kv_seq_len: tokens of the whole sequence where its last slots are padding (kv_seq_len:
    as seq_len where Skv equals Sq). Padding is neither read nor seen, and comes out as zeros.
    sinks: [Hq], learnable: one more score in each row of a head, of a key whose value is zero. Each
    rank gets the gradient of its own rows: reduce it over ranks as that of any other parameter.
    softcap: scores s become softcap * tanh(s / softcap) before the mask.
    scale: of the scores, positive, default D ** -0.5.
    backend: "torch", "nki" (kernels on a Neuron device), "simulate" (the same kernels on a CPU) or
    "auto" ("nki" for tensors on a Neuron device, else "torch"). "nki_loops" and "simulate_loops"
    skip at run time what windows and documents hide (docs/kernels/loops.md); "nki_ring" and
    "simulate_ring" run all steps as one device program (docs/kernels/ring.md). Each refuses what it
    cannot do.
    return_lse: also return the natural logarithm of each row's sum of exponentials, scale and sink
    included, fp32 [B, Hq, Sq]; it carries no gradient.

    Returns o [B, Hq, Sq, Dv] in q's dtype. Accumulation is fp32, rounded once. A row that sees
    nothing has o = 0 and lse = -inf (or its sink).

    Raises ValueError for arguments that are not supported (dropout_p never is); RankMismatchError,
    a ValueError, when ranks differ or another rank refuses its arguments, with its reason. Both
    before keys or values are sent, and on every rank. RingError when a rank is lost or late.
    Source: Ring Attention (arXiv 2310.01889).
    """
    if cp is not None and not isinstance(cp, CPContext):
        raise ValueError(
            f"cp: expected a CPContext or None, got {type(cp).__name__}; make one with "
            "CPContext.from_group"
        )
    q, k, v = _autocast(q, k, v)
    with refusing(cp, "forward"):
        validation.validate_tensors(q, k, v)
        validation.validate_flag("causal", causal)
        validation.validate_flag("return_lse", return_lse)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        validation.validate_window(window, causal=causal)
        validation.validate_softcap(softcap)
        validation.validate_dropout(dropout_p)
        validation.validate_scale(scale)
        validation.validate_sinks(sinks, q)
        validation.validate_derivatives(q, k, v, sinks)
        validation.validate_documents(segment_ids, cu_seqlens, q, k)
        packed = segment_ids is not None or cu_seqlens is not None
        validation.validate_lengths(q, k, seq_len, kv_seq_len, cp, packed=packed)
        name = resolve_backend_name(backend, q.device)
        differentiable = _differentiable(q, k, v, sinks)
    left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
    options = Options(
        cp="" if cp is None else cp.handle,
        causal=causal,
        left=left,
        right=right,
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        seq_len=seq_len,
        kv_seq_len=kv_seq_len,
        backend=name,
        differentiable=differentiable,
    )
    if name in RINGS:
        given = {"window": window, "segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
        o, lse = device_ring.attend(q, k, v, cp, options, given | {"sinks": sinks})
    else:
        o, lse, _ = ops.ring_forward(q, k, v, sinks, segment_ids, cu_seqlens, *options)
    return (o, lse) if return_lse else o


def _differentiable(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow. Raises ValueError where autograd could not keep an input."""
    given = [x for x in tensors if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in given):
        return False
    if not torch.compiler.is_compiling() and any(x.is_inference() for x in given):
        raise ValueError(
            "ring_attention: expected tensors that autograd can keep, got one made in "
            "inference_mode beside one that needs a gradient; clone it outside that mode"
        )
    return True


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """What PyTorch's own attention does under autocast: fp32 and 16-bit inputs get its dtype."""
    return [
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, Tensor)
        and x.dtype in validation.DTYPES
        and torch.amp.is_autocast_available(x.device.type)
        and torch.is_autocast_enabled(x.device.type)
        else x
        for x in tensors
    ]
