"""TorchTitan-style models: swap the inner attention module and keep everything else.

TorchTitan cuts inputs, labels and positions over the context-parallel mesh axis by itself
(`context_parallel_load_balancer = "headtail"`): rank r of n holds chunks r and 2n - 1 - r, which is
the layout "zigzag" here; without a load balancer it is "contiguous". Its inner attention module is
called with q, k, v `[B, L, N, H]` of the local tokens; `RingInnerAttention` takes its place.

Not here: FlexAttention's block masks (their masks are opaque functions; windows and documents are
arguments here), TorchTitan's configuration files.

Source: pytorch/torchtitan@b5bcd76, torchtitan/models/common/attention.py and
torchtitan/distributed/context_parallel/api.py.
Letters: B batch, L tokens of this rank, N heads, H head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext, refusing

LAYOUT_OF_LOAD_BALANCER = {"headtail": "zigzag", None: "contiguous"}
"""TorchTitan's `context_parallel_load_balancer` -> our layout."""

REPLACED = "ScaledDotProductAttention"


class RingInnerAttention(nn.Module):
    """Attention over the ranks of `cp`, called as TorchTitan calls its inner attention.

    cp: made with the layout that the inputs were cut in, e.g.
    `CPContext.from_mesh(mesh, "cp", layout=LAYOUT_OF_LOAD_BALANCER["headtail"])`; None is one
    device. window: each query sees that many keys, its own included. backend: as in
    `ring_attention`.
    """

    def __init__(
        self, cp: CPContext | None, *, window: int | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.cp, self.window, self.backend = cp, window, backend

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """o [B, L, N, H]. segment_ids [B, L] for packed documents.

        Raises ValueError for mask objects and unknown arguments, for key/value heads that differ
        from the query heads without `enable_gqa`, and what `ring_attention` raises.
        """
        with refusing(self.cp, "forward"):
            if attention_masks is not None:
                raise ValueError(
                    f"attention_masks: expected None, got {type(attention_masks).__name__}; give "
                    "windows to RingInnerAttention(window=...), packed documents as segment_ids"
                )
            unknown = sorted(name for name, value in kwargs.items() if value is not None)
            if unknown:
                raise ValueError(
                    f"expected arguments whose meaning is known, got {', '.join(unknown)}; leave "
                    "them out"
                )
            if not enable_gqa and k_BLNH.shape[2] != q_BLNH.shape[2]:
                raise ValueError(
                    f"expected as many key/value heads as query heads, got {k_BLNH.shape[2]} and "
                    f"{q_BLNH.shape[2]}; pass enable_gqa=True"
                )
        o_BNLH = ring_attention(
            *(x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH)),
            cp=self.cp,
            causal=is_causal,
            scale=scale,
            window=self.window,
            segment_ids=segment_ids,
            backend=self.backend,
        )
        assert isinstance(o_BNLH, Tensor), "return_lse was not asked for"
        return o_BNLH.transpose(1, 2)


def replace_inner_attention(
    model: nn.Module,
    cp: CPContext | None,
    *,
    window: int | None = None,
    backend: str = "auto",
    class_name: str = REPLACED,
) -> int:
    """Swap every sub-module of class `class_name` (or an earlier `RingInnerAttention`).

    cp, window, backend: as in `RingInnerAttention`. Returns how many were swapped.

    Raises ValueError when there is none: the model would go on with its local attention.
    """
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == class_name or isinstance(child, RingInnerAttention):
                setattr(parent, name, RingInnerAttention(cp, window=window, backend=backend))
                swapped += 1
    if swapped == 0:
        raise ValueError(
            f"expected modules of class {class_name} in {type(model).__name__}, got none; pass the "
            "name of its inner attention class as class_name"
        )
    return swapped
