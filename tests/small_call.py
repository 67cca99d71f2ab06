"""One small attention call, forward and backward, for tests of what ranks do around it."""

from __future__ import annotations

from typing import Any

import torch

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext


def attend(cp: CPContext, **change: Any) -> float:
    """The sum of a call's output; `change` is a shape, dtype, number of key/value heads, whether
    it trains, or an option of the call.
    """
    shape = change.pop("shape", (1, 4, 12, 16))
    dtype = change.pop("dtype", torch.float32)
    kv_heads = change.pop("kv_heads", 2)
    trains = change.pop("trains", True)
    q = torch.randn(shape, dtype=dtype, requires_grad=trains)
    k, v = (torch.randn(shape[0], kv_heads, *shape[2:], dtype=dtype) for _ in range(2))
    o = ring_attention(q, k, v, cp=cp, **change)
    if trains:
        o.sum().backward()
    return float(o.detach().sum())
