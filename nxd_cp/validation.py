"""What a caller may ask for, checked before any message is sent.

Does: raise ValueError with what was expected, what was given and what to do. Does not: compare
ranks with each other (`transport/agreement.py`), or check tile sizes (`Backend.validate`).
Letters: B batch, Hq query heads, Hkv key/value heads, Sq and Skv local rows, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from nxd_cp.schedule import Window, seq_len_multiple

if TYPE_CHECKING:
    from nxd_cp.context import CPContext

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTEGERS = (torch.int32, torch.int64)
MIN_SCALE, MAX_SCALE = 1e-20, 1e6
MAX_SECONDS = 86400.0
MAX_WINDOW = 2**60  # what passes the dispatcher, and can be added to a position
_PACKING = ("segment_ids", "cu_seqlens")


def validate_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: dtypes, devices, sizes, heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dims [batch, heads, sequence, head dim], "
                f"got {x.dim()} with shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected float32, bfloat16 or float16, got {x.dtype}; cast it first"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected dtype and device of q ({q.dtype} on {q.device}), "
                f"got {x.dtype} on {x.device}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty dim, got shape {tuple(x.shape)}")
        if x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {x.layout}; use to_dense()")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "k and v: expected equal shapes but for the head dim, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q and k: expected equal batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            "heads: expected key/value heads that divide query heads, "
            f"got {k.shape[1]} and {q.shape[1]}"
        )


def validate_lengths(
    q: Tensor,
    k: Tensor,
    seq_len: int | None,
    kv_seq_len: int | None,
    cp: CPContext | None,
    *,
    packed: bool = False,
) -> None:
    """Local lengths hold whole chunks of the layout, and tokens have room in them; with packed
    documents there are as many keys as queries.
    """
    layout, size = ("contiguous", 1) if cp is None else (cp.layout, cp.size)
    multiple = seq_len_multiple(layout, size) // size
    for name, x, tokens_name, tokens in (
        ("q", q, "seq_len", seq_len),
        ("k", k, "kv_seq_len", kv_seq_len),
    ):
        local_len = x.shape[2]
        if local_len % multiple:
            raise ValueError(
                f"local length of {name}: expected a multiple of {multiple} (chunks per rank, "
                f"{layout} on {size} ranks), got {local_len}; pad the sequence and pass "
                'seq_len, or use layout="contiguous"'
            )
        if tokens is not None and (type(tokens) is not int or not 0 < tokens <= local_len * size):
            raise ValueError(
                f"{tokens_name}: expected the number of tokens of the whole sequence, from 1 to "
                f"{local_len * size} (all slots of all ranks), got {tokens!r}"
            )
    num_queries = q.shape[2] * size if seq_len is None else seq_len
    if packed and kv_seq_len not in (None, num_queries):
        raise ValueError(
            "kv_seq_len: expected as many keys as queries with packed documents, "
            f"got {kv_seq_len} and {num_queries}"
        )


def validate_flag(name: str, value: bool) -> None:
    """True or False: a string such as "no" would count as True, and None as False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def validate_count(name: str, value: int) -> None:
    """A whole number of at least 1; True is none."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def validate_seconds(name: str, value: float) -> None:
    """A positive number of seconds, at most `MAX_SECONDS`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SECONDS:
        raise ValueError(
            f"{name}: expected seconds, more than 0 and at most {MAX_SECONDS:g}, got {value!r}"
        )


def validate_scale(scale: float) -> None:
    """A positive number that leaves a masked score far below every visible one.

    PyTorch's flash op and the kernels both mask before they scale: a scale of zero would uncover
    what is masked, and a negative one turn it into plus infinity.
    """
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(
            f"scale: expected a number from {MIN_SCALE} to {MAX_SCALE}, got {scale!r}; "
            "for a negative scale negate q"
        )


def validate_softcap(softcap: float | None) -> None:
    """A positive number, or None."""
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise ValueError(f"softcap: expected a number or None, got {softcap!r}")
    if not MIN_SCALE <= softcap <= 1 / MIN_SCALE:
        raise ValueError(
            f"softcap: expected a positive number (up to {1 / MIN_SCALE:g}) or None, got {softcap}"
        )


def validate_window(window: Window, *, causal: bool) -> None:
    """At least 1 key (the query's own) and a causal mask; or (left, right), each >= 0 or None."""
    if window is None:
        return
    if isinstance(window, tuple):
        ends = [end for end in window if end is not None]
        if len(window) != 2 or any(type(end) is not int or end < 0 for end in ends):
            raise ValueError(
                f"window: expected (left, right), each at least 0 or None, got {window}"
            )
        if any(end > MAX_WINDOW for end in ends):
            raise ValueError(
                f"window: expected (left, right), each at most {MAX_WINDOW}, got {window}; None is "
                "all keys"
            )
        if causal and window[1] not in (None, 0):
            raise ValueError(
                f"window: expected (left, 0) with causal=True, got {window}; pass causal=False to "
                "see keys after a query"
            )
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"window: expected a whole number of at least 1 or (left, right), got {window!r}"
        )
    if window > MAX_WINDOW:
        raise ValueError(f"window: expected at most {MAX_WINDOW} or None for all, got {window}")
    if not causal:
        raise ValueError(
            "window: expected causal=True with a window of one number, got causal=False; give "
            "(left, right), how many keys each query sees before and after its own"
        )


def validate_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """One number per query head, where q is."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or sinks.dtype not in DTYPES:
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(
            f"sinks: expected a float32, bfloat16 or float16 tensor or None, got {got}"
        )
    if sinks.shape != (q.shape[1],) or sinks.device != q.device:
        raise ValueError(
            f"sinks: expected shape ({q.shape[1]},), one per query head, on {q.device}, "
            f"got {tuple(sinks.shape)} on {sinks.device}"
        )


def validate_documents(
    segment_ids: Tensor | None, cu_seqlens: Tensor | None, q: Tensor, k: Tensor
) -> None:
    """segment_ids [B, S] or cu_seqlens [documents + 1], integers, and as many keys as queries."""
    given = [
        name for name, x in zip(_PACKING, (segment_ids, cu_seqlens), strict=True) if x is not None
    ]
    if not given:
        return
    if len(given) == 2:
        raise ValueError("segment_ids and cu_seqlens: expected at most one of them, got both")
    for name, x in zip(_PACKING, (segment_ids, cu_seqlens), strict=True):
        if x is not None and (not isinstance(x, Tensor) or x.dtype not in INTEGERS):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected an int32 or int64 tensor or None, got {got}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{given[0]}: expected as many keys as queries with packed documents, "
            f"got {k.shape[2]} and {q.shape[2]} per rank"
        )
    shape = (q.shape[0], q.shape[2])
    if segment_ids is not None and (segment_ids.shape != shape or segment_ids.device != q.device):
        raise ValueError(
            f"segment_ids: expected shape {shape} on {q.device}, "
            f"got {tuple(segment_ids.shape)} on {segment_ids.device}"
        )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(
            "cu_seqlens: expected [documents + 1] cumulative lengths of the whole sequence, "
            f"0 first, got shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens is not None and cu_seqlens.device not in (torch.device("cpu"), q.device):
        raise ValueError(
            f"cu_seqlens: expected a tensor on the CPU or where q is, on {q.device}, got one on "
            f"{cu_seqlens.device}"
        )


def validate_derivatives(*tensors: Tensor | None) -> None:
    """No forward-mode derivative: PyTorch would drop it and go on as if it were zero."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "ring_attention: expected inputs without forward-mode derivatives (jvp), got some; use "
            "reverse mode (backward, torch.autograd.grad)"
        )


def validate_dropout(dropout_p: float) -> None:
    """Dropout that is equal at any ring size is not to be had; see `ring_attention`."""
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p: expected 0.0, got {dropout_p}; no generator gives equal masks at every "
            "ring size and is fast on the engines, so attention dropout is not supported"
        )
