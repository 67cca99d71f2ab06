"""Put this package's ring into an NxD model: `convert` a model object, or `patch` its module.

`convert` is the better of the two: key/value heads reach the ring as they are, in any layout.
`patch` changes no object and no line of the model; keys and values then arrive repeated, and the
layout is contiguous, because NxD's Llama makes contiguous positions when it is given none.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.integrations.nxd.attention import nki_ring_attn_func
from nxd_cp.integrations.nxd.state import shared_context

HOOK = "call_attn_impln"
GROUPS = "num_key_value_groups"
NAME = "nki_ring_attn_func"


def convert(
    model: nn.Module,
    cp: CPContext | None = None,
    *,
    layout: str = "zigzag",
    backend: str = "auto",
) -> nn.Module:
    """Make the attention of NxD's Llama (examples and NxDT) call `ring_attention`; returns `model`.

    Every module with a method `call_attn_impln(q, k, v)` gets ours, and its `num_key_value_groups`
    becomes 1, so that its `repeat_kv` repeats nothing. Call it inside the function that you give to
    `initialize_parallel_model`, before pipeline stages are cut.

    cp: default the context of NxD's groups with `layout`. With a layout that is not contiguous the
    model must be given `position_ids`; a call without them raises.

    Raises ValueError for a model without such modules, or one that asks for flash attention.
    """
    attentions = [module for module in model.modules() if callable(getattr(module, HOOK, None))]
    if not attentions:
        raise ValueError(
            f"model: expected modules with a method {HOOK}(q, k, v), as in NxD's Llama, got "
            f"{type(model).__name__} without any; call ring_attention in your attention instead"
        )
    for module in attentions:
        if getattr(module, "use_flash_attention", False):
            raise ValueError(
                f"{type(module).__name__}: expected use_flash_attention=False with context "
                "parallelism, got True; set it in the model's config"
            )
    context = shared_context(layout) if cp is None else cp
    for module in attentions:
        setattr(module, HOOK, functools.partial(_attend, cp=context, backend=backend))
        setattr(module, GROUPS, 1)
    if context.size > 1 and context.layout != "contiguous":
        hook = functools.partial(_require_positions, layout=context.layout)
        model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def patch(modeling: ModuleType | Any, cp: CPContext | None = None, *, backend: str = "auto") -> Any:
    """Replace `nki_ring_attn_func` in a modeling module by ours; returns what was there.

    modeling: the module that calls it (NxD's modeling_llama_nxd), not the one that defines it.
    Raises ValueError when the name is not there, or the context is not contiguous.
    """
    if not hasattr(modeling, NAME):
        raise ValueError(
            f"modeling: expected a module that uses {NAME}, got {modeling!r}; pass the module of "
            "the model, not the one of the kernel"
        )
    if cp is not None and cp.layout != "contiguous":
        raise ValueError(
            f'cp: expected layout="contiguous" for {NAME}, got {cp.layout!r}; use convert(model)'
        )
    before = getattr(modeling, NAME)
    setattr(modeling, NAME, functools.partial(nki_ring_attn_func, cp=cp, backend=backend))
    return before


def _attend(q: Tensor, k: Tensor, v: Tensor, *, cp: CPContext, backend: str) -> Any:
    """What NxD's `call_attn_impln` is: [B, H, S, D] in and out."""
    return ring_attention(q, k, v, cp=cp, backend=backend)


def _require_positions(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layout: str
) -> None:
    if kwargs.get("position_ids") is None:
        raise ValueError(
            f'position_ids: expected global positions with layout="{layout}", got none (NxD would '
            "number the chunk as if it were contiguous); pass position_ids=batch['position_ids'] "
            "of get_batch_on_this_context_parallel_rank, or convert(layout='contiguous')"
        )
