"""Cut global tensors into each rank's part of the sequence, and put them together again.

Which tokens a rank holds, and in which order, is the schedule's decision (`token_runs`); nothing
here depends on the layout. Every rank is given the same global tensor: nothing is sent by `shard`
and `shard_batch`.

Not here: padding, packed documents, key/value heads.

Letters: B batch, S global sequence length, L = S / ranks.
"""

from collections.abc import Mapping

import torch

from nxd_cp.context import CPContext
from nxd_cp.schedule import token_runs

IGNORE_INDEX = -100
"""Label of a token that has no part in the loss; the default of `cross_entropy` in torch."""


def shard(x: torch.Tensor, cp: CPContext, dim: int = 1) -> torch.Tensor:
    """This rank's tokens of `x`, in the order in which `ring_attention` expects them.

    Args:
        x: global tensor of any dtype with S tokens along `dim`, equal on all ranks.
        cp: the context; its layout decides which tokens.
        dim: the sequence dimension.

    Returns:
        A new tensor with L = S / cp.size tokens along `dim`. Differentiable.

    Raises:
        ValueError: S is not divisible as the layout needs it.
    """
    return torch.cat([_take(x, run, dim) for run in _runs(cp, cp.rank, x.shape[dim])], dim)


def unshard(x_local: torch.Tensor, cp: CPContext, dim: int = 1) -> torch.Tensor:
    """The global tensor of which every rank holds the part that `shard` gave it.

    A collective call: every rank makes it, with equal shapes. It is for evaluation and logging, and
    no gradient flows back through it.

    Args:
        x_local: L tokens along `dim`.
        cp: the context.
        dim: the sequence dimension.

    Returns:
        The same S = L * cp.size tokens on every rank, in global order.

    Raises:
        ValueError: `x_local` needs a gradient, or L does not fit the layout.
    """
    if torch.is_grad_enabled() and x_local.requires_grad:
        raise ValueError(
            "expected a tensor that needs no gradient, got one with requires_grad=True; "
            "unshard under torch.no_grad() or pass x_local.detach()"
        )
    seq_len = x_local.shape[dim] * cp.size
    runs_by_rank = [_runs(cp, rank, seq_len) for rank in range(cp.size)]
    shape = list(x_local.shape)
    shape[dim] = seq_len
    x = x_local.new_empty(shape)
    for runs, part in zip(runs_by_rank, cp.all_gather(x_local.contiguous()), strict=True):
        for run, piece in zip(runs, part.split([len(run) for run in runs], dim), strict=True):
            _take(x, run, dim).copy_(piece)
    return x


def shard_batch(batch: Mapping[str, torch.Tensor], cp: CPContext) -> dict[str, torch.Tensor]:
    """This rank's part of a training batch for next-token prediction.

    Labels are shifted left by one BEFORE the cut, so that each token has the label of its true
    successor, which often lives on another rank; the last token of a sequence gets IGNORE_INDEX.
    `position_ids` are global and added unless the batch brings its own.

    Args:
        batch: tensors [B, S, ...], equal on all ranks. `labels`, if present, are the tokens
            themselves, not shifted (what Hugging Face models take). The reference length S is that
            of `input_ids`, or else of the first entry.
        cp: the context.

    Returns:
        A new dict with every entry cut to [B, L, ...], and `position_ids` int64 [B, L].

    Raises:
        ValueError: an entry is no tensor or has no [B, S] in front, S does not fit the layout,
            labels are not signed integers, or there is an `attention_mask` (a padding mask would
            not reach `ring_attention`).
    """
    if not batch:
        raise ValueError("expected a batch with at least one tensor, got an empty one")
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"expected {key} to be a tensor, got {type(value).__name__}")
    if "attention_mask" in batch:
        raise ValueError(
            "expected no attention_mask, got one; pad on the right, give padded tokens the label "
            f"{IGNORE_INDEX} and leave the mask out: causal attention does not look there"
        )
    name, first = next(iter(batch.items()))
    name, first = ("input_ids", batch["input_ids"]) if "input_ids" in batch else (name, first)
    if first.dim() < 2:
        raise ValueError(f"expected {name} of shape [batch, sequence, ...], got {_shape(first)}")
    num_rows, seq_len = first.shape[:2]
    for key, value in batch.items():
        if tuple(value.shape[:2]) != (num_rows, seq_len):
            raise ValueError(
                f"expected {key} to start with [{num_rows}, {seq_len}] as {name} does, "
                f"got {_shape(value)}; keep what has no sequence dimension out of the batch"
            )
    whole = dict(batch)
    if "labels" in whole:
        if whole["labels"].dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(
                f"expected labels of int16, int32 or int64, which can hold {IGNORE_INDEX}, "
                f"got {whole['labels'].dtype}; cast them"
            )
        whole["labels"] = _next_token(whole["labels"])
    if "position_ids" not in whole:
        positions = torch.arange(seq_len, device=first.device)
        whole["position_ids"] = positions.expand(num_rows, seq_len)
    return {key: shard(value, cp) for key, value in whole.items()}


def _next_token(labels_BS: torch.Tensor) -> torch.Tensor:
    end = torch.full_like(labels_BS[:, :1], IGNORE_INDEX)
    return torch.cat([labels_BS[:, 1:], end], dim=1)


def _runs(cp: CPContext, rank: int, seq_len: int) -> tuple[range, ...]:
    return token_runs(cp.layout, cp.size, rank, seq_len)


def _take(x: torch.Tensor, run: range, dim: int) -> torch.Tensor:
    """A view of the tokens of one run."""
    index = [slice(None)] * x.dim()
    index[dim] = slice(run.start, run.stop, run.step)
    return x[tuple(index)]


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)
