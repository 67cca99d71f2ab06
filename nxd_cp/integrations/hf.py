"""Hugging Face Transformers models over the ranks of a context-parallel group.

Importing this module registers the attention implementation "nxd_ring" and its mask check:

    from nxd_cp.integrations import hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="nxd_ring")
    hf.attach(model, cp)
    loss = model(**hf.shard_batch(batch, cp)).loss  # summed over ranks, this is the loss

What a model asks for in ways that attention functions see (sliding windows, soft-capping, sinks,
packed documents by `segment_ids`) reaches `ring_attention`; what it asks for by a mask tensor is
refused, because each rank sees only its own part of the sequence.

Not here: generation (`hf_generation`), the Trainer's own context-parallel switch (it insists
on "sdpa").

Source: the AttentionInterface page of the Transformers documentation.
Letters: B batch, L tokens of this rank, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nxd_cp import validation
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext, refusing
from nxd_cp.integrations.hf_masks import check_mask, refuse_padding
from nxd_cp.integrations.hf_positions import PositionCheck
from nxd_cp.sharding import IGNORE_INDEX
from nxd_cp.sharding import shard_batch as shard_token_batch

NAME = "nxd_ring"

_ATTACHMENT = "nxd_cp_attachment"

_NO_EFFECT_ON_ATTENTION = frozenset(
    {
        "cache_position",
        "labels",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


class Cached(Protocol):
    """Attention over a cache, in the place of `ring_attention` while a model generates."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """o [B, H, L, D]; stores k and v. options: scale, window, softcap and sinks."""


class Attachment:
    """What a model's attention modules need to know; copies of the model share it.

    cached: set while a model generates (see `hf_generation`).
    """

    def __init__(self, cp: CPContext | None, backend: str) -> None:
        self.cp, self.backend = cp, backend
        self.check_positions = PositionCheck(cp)
        self.cached: Cached | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self


def attach(model: PreTrainedModel, cp: CPContext | None, *, backend: str = "auto") -> None:
    """Make the attention of `model` run over the ranks of `cp`; call it again to change that.

    model: loaded with `attn_implementation="nxd_ring"`. cp: None is one device. backend: as in
    `ring_attention`.

    Raises ValueError when the model uses another attention implementation, or has no attention
    module that says whether it is causal.
    """
    used = getattr(model.config, "_attn_implementation", None)
    if used != NAME:
        raise ValueError(
            f"expected a model with attn_implementation={NAME!r}, got {used!r}; pass it to "
            f"from_pretrained or call model.set_attn_implementation({NAME!r})"
        )
    modules = [module for module in model.modules() if hasattr(module, "is_causal")]
    if not modules:
        raise ValueError(
            f"expected attention modules with an is_causal attribute, got none in "
            f"{type(model).__name__}; this model's attention does not go through the interface"
        )
    attachment = Attachment(cp, backend)
    for module in modules:
        setattr(module, _ATTACHMENT, attachment)


def shard_batch(
    batch: Mapping[str, Tensor],
    cp: CPContext,
    *,
    num_items_in_batch: Tensor | int | None = None,
    grad_average_over: int = 1,
) -> dict[str, Any]:
    """This rank's part of a batch, as keyword arguments of a causal language model.

    A collective call when there are labels and no count is given.

    batch: global tensors [B, S], equal on all ranks: `input_ids` and, if wanted, `labels` (not
    shifted), `segment_ids` (packed documents), `position_ids`, and an `attention_mask` of ones.
    num_items_in_batch: labels that count, over all ranks and accumulated micro-batches; by default
    those of this batch. grad_average_over: as in `token_mean_loss`.

    Returns `input_ids`, `position_ids` (global) and `attention_mask` (of ones, so that the model
    takes no jump in positions for a new document), and with labels `labels`, `shift_labels` and
    `num_items_in_batch`, which make the model's own loss this rank's share of the token mean: the
    SUM over ranks is the loss, and the sum of the ranks' gradients is its gradient.

    Raises ValueError for padding, and what `nxd_cp.shard_batch` raises.
    """
    counts = "labels" in batch and num_items_in_batch is None  # then the others wait for us
    with refusing(cp if counts else None, "shard_batch"):
        validation.validate_count("grad_average_over", grad_average_over)
        whole = dict(batch)
        refuse_padding(whole.pop("attention_mask", None))
        local: dict[str, Any] = dict(shard_token_batch(whole, cp))
    first = local["input_ids"] if "input_ids" in local else next(iter(local.values()))
    local["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if "labels" in local:
        local["shift_labels"] = local["labels"]
        if num_items_in_batch is None:
            counted = (local["labels"] != IGNORE_INDEX).sum()
            num_items_in_batch = cp.all_reduce(counted).clamp(min=1)
        local["num_items_in_batch"] = num_items_in_batch / grad_average_over
    return local


def ring_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    segment_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind "nxd_ring", with the signature that Transformers calls.

    query: [B, H, L, D]; key, value: [B, G, L, D], rotary embeddings applied. s_aux: sink logits
    [H]. Returns o [B, L, H, D] and no attention weights.

    Raises ValueError when the model was not attached, for a mask tensor, for position ids that are
    not those of this rank's tokens, and for arguments whose meaning is not known.
    """
    attachment = attachment_of(module)
    cp, cached = attachment.cp, attachment.cached
    causal = bool(module.is_causal if is_causal is None else is_causal)
    with refusing(cp, "forward"):
        _refuse_mask(attention_mask)
        _refuse_unknown(kwargs)
        if key.shape[2] != query.shape[2]:
            raise ValueError(
                f"expected as many keys as queries, got {key.shape[2]} and {query.shape[2]}; pass "
                "use_cache=False, or generate with nxd_cp.integrations.hf_generation"
            )
        if cached is None and segment_ids is None and causal:
            attachment.check_positions(module, kwargs.get("position_ids"), query.shape[2])
    if cached is not None:
        options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
        layer = getattr(module, "layer_idx", None)
        if not causal or segment_ids is not None or layer is None:
            raise ValueError(
                "expected a causal decoder layer without segment_ids while generating, got "
                f"causal={causal} in {type(module).__name__}"
            )
        return cached.attend(layer, query, key, value, **options).transpose(1, 2), None
    o_BHLD = ring_attention(
        query,
        key,
        value,
        cp=cp,
        causal=causal,
        scale=scaling,
        window=sliding_window,
        segment_ids=segment_ids,
        sinks=s_aux,
        softcap=softcap,
        dropout_p=dropout,
        backend=attachment.backend,
    )
    assert isinstance(o_BHLD, Tensor), "return_lse was not asked for"
    return o_BHLD.transpose(1, 2), None


def attachment_of(module: torch.nn.Module) -> Attachment:
    """What `attach` left on an attention module. Raises ValueError when there is nothing."""
    attachment = getattr(module, _ATTACHMENT, None)
    if attachment is None:
        raise ValueError(
            "expected a model that knows its context, got one without; call "
            "nxd_cp.integrations.hf.attach(model, cp) first (cp=None for one device)"
        )
    return attachment


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: expected none, got a tensor {list(attention_mask.shape)}; each rank "
            "sees only its own tokens, so masks are given as windows or segment_ids"
        )


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    unknown = {
        name
        for name, value in kwargs.items()
        if value is not None and name not in _NO_EFFECT_ON_ATTENTION
    }
    if unknown:
        raise ValueError(
            f"expected arguments whose meaning is known, got {', '.join(sorted(unknown))}; packed "
            "documents are given as segment_ids, what this model wants here is not supported"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False; attention weights are never formed")


AttentionInterface.register(NAME, ring_attention_forward)
AttentionMaskInterface.register(NAME, check_mask)
