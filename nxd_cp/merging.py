"""The merge of two partial results of the same query rows over different keys, in PyTorch.

Does: the online softmax (arXiv 1805.02867), in place. Does not: know which rows or keys these are.
Kernels that take a carry merge inside; `kernels/merge.py` merges two results on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(o: Tensor, lse: Tensor, o_part: Tensor, lse_part: Tensor) -> None:
    """Add a part to the running result, in place; all fp32. o: [..., S, D], lse: [..., S].

    With weight w = sigmoid(lse_part - lse): o moves to o + w (o_part - o), lse to their logaddexp.
    Where the part shows nothing the weight is 0, also where -inf + inf would be NaN.
    """
    weight = torch.sigmoid(lse_part - lse).masked_fill_(lse_part == -torch.inf, 0.0)
    o.lerp_(o_part, weight.unsqueeze(-1))
    torch.logaddexp(lse, lse_part, out=lse)
