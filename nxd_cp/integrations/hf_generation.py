"""Generate text with a Hugging Face model whose key/value cache is split over the ranks.

Does: prefill a prompt that is cut over all ranks, then add token after token, each against the
parts of the cache that the ranks hold; greedy or by temperature. Does not: use Transformers' own
caches or `model.generate`, beam search, stopping criteria other than one end token.

Letters: B batch, S prompt tokens, L prompt tokens of this rank, T new tokens, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.documents import slot_positions
from nxd_cp.inference import KVCache, decode, prefill
from nxd_cp.integrations.hf import Attachment, attachment_of
from nxd_cp.schedule import padded_len


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cp: CPContext,
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,
    eos_token_id: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The tokens that follow each prompt, equal on all ranks.

    A collective call: every rank makes it.

    Args:
        model: a causal language model after `hf.attach(model, cp)`, in eval mode.
        input_ids: prompts int64 [B, S], whole and equal on all ranks, padded on the right.
        cp: the context.
        max_new_tokens: T.
        lengths: int64 [B], tokens of each prompt; default S for all.
        eos_token_id: a sequence that has made it goes on with it; all such sequences end the call.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn on rank 0.
        generator: for the draws.
        on_token: called with each new column, int64 [B].

    Returns:
        int64 [B, at most T].

    Raises:
        ValueError: the model was not attached to `cp`, is in training mode, or the arguments do not
            fit; on all ranks where it is so on one, or where the arguments differ.
    """
    with cp.refusing("generate"):
        attachment = _check(model, cp, input_ids, lengths, max_new_tokens, temperature)
    described = {"tokens": str(max_new_tokens), "end": str(eos_token_id)}
    prompts = {"prompts": _fingerprint(input_ids), "lengths": _fingerprint(lengths)}
    cp.agree_on("generate", described | prompts)
    counts = torch.full_like(input_ids[:, 0], input_ids.shape[1]) if lengths is None else lengths
    pick = _Pick(cp, temperature, generator)
    with _caching(attachment, cp, counts, max_new_tokens) as cached:
        logits = _prefill(model, input_ids, cp, counts)
        cached.prompt_is_stored()
        columns: list[Tensor] = []
        ended = torch.zeros_like(counts, dtype=torch.bool)
        for step in range(max_new_tokens):
            column = pick(logits)
            if eos_token_id is not None:
                column = column.masked_fill(ended, eos_token_id)
                ended |= column == eos_token_id
            columns.append(column)
            if on_token is not None:
                on_token(column)
            if bool(ended.all()) or step == max_new_tokens - 1:
                break
            positions = (counts + step)[:, None]
            out = model(column[:, None], position_ids=positions, use_cache=False)
            logits = out.logits[:, -1]
    return torch.stack(columns, 1)


class _Caches:
    """A `Cached`: one split cache per layer, made when the layer is first met."""

    def __init__(self, cp: CPContext, backend: str, counts: Tensor, capacity: int) -> None:
        self._cp, self._backend, self._counts, self._capacity = cp, backend, counts, capacity
        self._layers: dict[int, KVCache] = {}
        self._in_prompt = True

    def prompt_is_stored(self) -> None:
        """From here on every rank brings the same new token."""
        self._in_prompt = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """See `hf.Cached`."""
        if layer not in self._layers:
            self._layers[layer] = KVCache(
                batch=k.shape[0],
                num_kv_heads=k.shape[1],
                head_dim=k.shape[3],
                v_head_dim=v.shape[3],
                capacity=self._capacity,
                dtype=k.dtype,
                device=k.device,
            )
        cache, cp = self._layers[layer], self._cp
        if self._in_prompt:
            return prefill(
                q, k, v, cache=cache, cp=cp, lengths=self._counts, backend=self._backend, **options
            )
        o = decode(q, k, v, cache=cache, cp=cp, **options)
        assert isinstance(o, Tensor), "return_lse was not asked for"
        return o


@contextmanager
def _caching(
    attachment: Attachment, cp: CPContext, counts: Tensor, max_new_tokens: int
) -> Iterator[_Caches]:
    prompt_len = padded_len(cp.layout, cp.size, int(counts.max()))
    capacity = prompt_len // cp.size + -(-max_new_tokens // cp.size) + 1
    caches = _Caches(cp, attachment.backend, counts, capacity)
    attachment.cached = caches
    try:
        yield caches
    finally:
        attachment.cached = None


def _prefill(model: PreTrainedModel, input_ids: Tensor, cp: CPContext, counts: Tensor) -> Tensor:
    """Logits [B, V] of each prompt's last token, equal on all ranks."""
    longest = int(counts.max())
    padding = padded_len(cp.layout, cp.size, longest) - longest
    whole = F.pad(input_ids[:, :longest], (0, padding))
    ours = slot_positions(cp.layout, cp.size, cp.rank, whole.shape[1]).to(whole.device)
    last = counts[:, None] - 1 == ours  # [B, L]: where a prompt's last token is ours
    logits_BBV = model(
        whole[:, ours],
        position_ids=ours[None],
        attention_mask=torch.ones_like(last),
        logits_to_keep=last.int().argmax(1),
        use_cache=False,
    ).logits
    logits = logits_BBV.diagonal(dim1=0, dim2=1).T
    return cp.all_reduce(torch.where(last.any(1, keepdim=True), logits, 0.0))


class _Pick:
    """The next token of each sequence, from logits [B, V]; rank 0 decides."""

    def __init__(self, cp: CPContext, temperature: float, generator: torch.Generator | None):
        self._cp, self._temperature, self._generator = cp, temperature, generator

    def __call__(self, logits: Tensor) -> Tensor:
        with self._cp.refusing("generate"):  # a NaN among the logits cannot be drawn from
            column = self._choose(logits)
        return self._cp.all_reduce(column if self._cp.rank == 0 else torch.zeros_like(column))

    def _choose(self, logits: Tensor) -> Tensor:
        if self._temperature == 0:
            return logits.argmax(-1)
        weights = (logits.float() / self._temperature).softmax(-1)
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]


def _fingerprint(numbers: Tensor | None) -> str:
    """The shape, and a few characters that differ where the numbers do."""
    if numbers is None:
        return "None"
    crc = zlib.crc32(str(numbers.tolist()).encode())
    return f"{tuple(numbers.shape)} (crc {crc:08x})"


def _check(
    model: PreTrainedModel,
    cp: CPContext,
    input_ids: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    temperature: float,
) -> Attachment:
    modules = [module for module in model.modules() if hasattr(module, "is_causal")]
    attachment = attachment_of(modules[0] if modules else model)
    if attachment.cp is not cp:
        raise ValueError("cp: expected the context that the model was attached to, got another")
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training; call model.eval()")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected [batch, tokens], got {list(input_ids.shape)}")
    validation.validate_count("max_new_tokens", max_new_tokens)
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    if lengths is not None and (
        lengths.shape != input_ids.shape[:1]
        or bool((lengths < 1).any())
        or bool((lengths > input_ids.shape[1]).any())
    ):
        raise ValueError(
            f"lengths: expected {input_ids.shape[0]} numbers from 1 to {input_ids.shape[1]}, got "
            f"{lengths.tolist()}"
        )
    return attachment
