"""What a caller may ask for, checked before any message is sent.

Does: raise ValueError with what was expected, what was given and what to do. Does not: compare
ranks with each other (`transport/agreement.py`), or check tile sizes (`Backend.validate`).
Letters: B batch, Hq query heads, Hkv key/value heads, S local rows, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.schedule import seq_len_multiple

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_SCALE, MAX_SCALE = 1e-20, 1e6


def validate_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Hq, S, D], k and v [B, Hkv, S, D]: ranks, dtypes, devices, sizes and head counts."""
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
    if k.shape != v.shape:
        raise ValueError(
            f"k and v: expected equal shapes, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(
            "q and k: expected equal batch, sequence length and head dim, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            "heads: expected key/value heads that divide query heads, "
            f"got {k.shape[1]} and {q.shape[1]}"
        )


def validate_length(local_len: int, *, layout: str, size: int) -> None:
    """The local length must hold a whole number of the layout's chunks."""
    multiple = seq_len_multiple(layout, size) // size
    if local_len % multiple:
        raise ValueError(
            f"local sequence length: expected a multiple of {multiple} (chunks per rank, "
            f"{layout} on {size} ranks), got {local_len}; pad the batch or use "
            'layout="contiguous"'
        )


def validate_causal(causal: bool) -> None:
    """True or False: None would silently mean full attention."""
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {causal!r}")


def validate_scale(scale: float) -> None:
    """A positive number that leaves a masked score far below every visible one.

    PyTorch's flash op and the kernels both mask before they scale: a scale of zero would uncover
    what is masked, and a negative one turn it into plus infinity.
    """
    if not isinstance(scale, int | float) or not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(
            f"scale: expected a number from {MIN_SCALE} to {MAX_SCALE}, got {scale!r}; "
            "for a negative scale negate q"
        )


def validate_window(window: int | None, *, causal: bool) -> None:
    """A whole number of keys, at least 1 (the query's own), and a causal mask."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window: expected a whole number of at least 1, got {window!r}")
    if not causal:
        raise ValueError("window: expected causal=True with a window, got causal=False")


def validate_segment_ids(segment_ids: Tensor | None, q: Tensor, *, backend: str) -> None:
    """Integers [B, S] where q is; only the torch backend reads them."""
    if segment_ids is None:
        return
    if not isinstance(segment_ids, Tensor) or segment_ids.dtype not in (torch.int32, torch.int64):
        got = segment_ids.dtype if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
        raise ValueError(f"segment_ids: expected an int32 or int64 tensor or None, got {got}")
    if segment_ids.shape != (q.shape[0], q.shape[2]) or segment_ids.device != q.device:
        raise ValueError(
            f"segment_ids: expected shape {(q.shape[0], q.shape[2])} on {q.device}, "
            f"got {tuple(segment_ids.shape)} on {segment_ids.device}"
        )
    if backend != "torch":
        raise ValueError(
            f'segment_ids: expected None with backend "{backend}"; use backend="torch"'
        )


def refuse_unsupported(**options: object) -> None:
    """Raise for every option that was set and is not built."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None, got {value!r}; this version supports causal, full, "
                "sliding-window and packed attention only"
            )


def validate_dropout(dropout_p: float) -> None:
    """Dropout that is equal at any ring size is not to be had; see `ring_attention`."""
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p: expected 0.0, got {dropout_p}; no generator gives equal masks at every "
            "ring size and is fast on the engines, so attention dropout is not supported"
        )
