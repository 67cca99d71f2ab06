"""Cut global tensors into each rank's part of the sequence, and put them together again.

Which tokens a rank holds, and in which order, is the schedule's decision (`token_runs`); nothing
here depends on the layout. Every rank is given the same global tensor: nothing is sent by `shard`
and `shard_batch`.

A sequence that the ranks do not divide is padded at its end when the caller says with what; its
length then goes to `ring_attention` as `seq_len`.

Not here: attention over what was cut (`attention.py`), positions (`positions.py`).

Letters: B batch, S global sequence length, L slots per rank, S / ranks where that divides.
"""

from collections.abc import Mapping
from typing import Any

import torch

from nxd_cp import validation
from nxd_cp.backends import get_support_kernels, resolve_backend_name
from nxd_cp.context import CPContext
from nxd_cp.positions import position_ids
from nxd_cp.schedule import padded_len, seq_len_multiple, token_runs

IGNORE_INDEX = -100
"""Label of a token that has no part in the loss; the default of `cross_entropy` in torch."""


def shard(
    x: torch.Tensor, cp: CPContext, dim: int = 1, *, pad_value: float | None = None
) -> torch.Tensor:
    """This rank's tokens of `x`, in the order in which `ring_attention` expects them.

    Args:
        x: global tensor of any dtype with S tokens along `dim`, equal on all ranks.
        cp: the context; its layout decides which tokens.
        dim: the sequence dimension.
        pad_value: fills the slots behind the last token when S does not divide; None raises then.

    Returns:
        A new tensor with L slots along `dim`, the tokens first. Differentiable.

    Raises:
        ValueError: S is not divisible as the layout needs it, and there is no `pad_value`; or x's
            dtype cannot hold it.
    """
    _check_dim(x, dim)
    if pad_value is not None:
        _check_value(pad_value, x.dtype)
    seq_len = x.shape[dim]
    slots = _slots(cp, seq_len, may_pad=pad_value is not None)
    parts = [_take(x, run, dim) for run in token_runs(cp.layout, cp.size, cp.rank, slots, seq_len)]
    num_padding = slots // cp.size - sum(part.shape[dim] for part in parts)
    if num_padding:
        assert pad_value is not None, "without it the length divides"
        shape = list(x.shape)
        shape[dim] = num_padding
        parts.append(x.new_full(shape, pad_value))
    return torch.cat(parts, dim)


def unshard(
    x_local: torch.Tensor, cp: CPContext, dim: int = 1, *, seq_len: int | None = None
) -> torch.Tensor:
    """The global tensor of which every rank holds the part that `shard` gave it.

    A collective call: every rank makes it, with equal shapes. It is for evaluation and logging, and
    no gradient flows back through it.

    Args:
        x_local: L slots along `dim`.
        cp: the context.
        dim: the sequence dimension.
        seq_len: tokens of the whole sequence where it was padded; the padding is left out.

    Returns:
        The same S tokens on every rank, in global order.

    Raises:
        ValueError: `x_local` needs a gradient, L does not fit the layout, or `seq_len` does not fit
            L; on all ranks where it is so on one, or where two differ.
    """
    with cp.refusing("unshard"):
        _check_dim(x_local, dim)
        if torch.is_grad_enabled() and x_local.requires_grad:
            raise ValueError(
                "x_local: expected a tensor that needs no gradient, got one with "
                "requires_grad=True; unshard under torch.no_grad() or pass x_local.detach()"
            )
        if seq_len is not None and type(seq_len) is not int:
            raise ValueError(f"seq_len: expected a whole number or None, got {seq_len!r}")
        dim %= x_local.dim()
        slots = x_local.shape[dim] * cp.size
        ranks = range(cp.size)
        runs_by_rank = [token_runs(cp.layout, cp.size, rank, slots, seq_len) for rank in ranks]
    described = {"shape": _shape(x_local), "dtype": x_local.dtype, "dim": dim, "seq_len": seq_len}
    cp.agree_on("unshard", {name: str(value) for name, value in described.items()})
    parts = cp.transport.all_gather(x_local.detach().contiguous())
    shape = list(x_local.shape)
    shape[dim] = slots if seq_len is None else seq_len
    x = x_local.new_empty(shape)
    for runs, part in zip(runs_by_rank, parts, strict=True):
        first = 0
        for run in runs:
            _take(x, run, dim).copy_(part.narrow(dim, first, len(run)))
            first += len(run)
    return x


def in_rank_order(
    x: torch.Tensor,
    cp: CPContext,
    dim: int = 1,
    *,
    inverse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The whole sequence in the order in which ranks hold it, or back: rank 0's tokens first.

    For code that cuts a sequence into equal parts itself, as tensor libraries do: cut the result.

    Args:
        x: global tensor of any dtype with S tokens along `dim`.
        cp: the context; its layout decides the order.
        dim: the sequence dimension.
        inverse: from the order of the ranks to that of the sequence.
        backend: as of `ring_attention`; "nki" and "simulate" move tokens by the kernel
            `permute_tokens`, "auto" does on a Neuron device.

    Returns:
        A new tensor of x's shape and dtype. Differentiable.

    Raises:
        ValueError: S is not divisible as the layout needs it, or a limit of the kernel.
    """
    _check_dim(x, dim)
    validation.validate_flag("inverse", inverse)
    seq_len = x.shape[dim]
    _slots(cp, seq_len, may_pad=False)
    runs = [run for rank in range(cp.size) for run in token_runs(cp.layout, cp.size, rank, seq_len)]
    name = resolve_backend_name(backend, x.device)
    if name != "torch":
        dim %= x.dim()
        around = x.shape[:dim].numel(), seq_len, x.shape[dim + 1 :].numel()
        found: torch.Tensor = _ByKernel.apply(x.reshape(around), runs, inverse, name)
        return found.reshape(x.shape)
    order = torch.cat([torch.arange(run.start, run.stop, run.step) for run in runs])
    return x.index_select(dim, (order.argsort() if inverse else order).to(x.device))


class _ByKernel(torch.autograd.Function):
    """`in_rank_order` of [before, S, behind] on a device; its gradient goes the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, runs: list[range], inverse: bool, name: str
    ) -> torch.Tensor:
        ctx.call = runs, inverse, name
        as_numbers = tuple((run.start, len(run), run.step) for run in runs)
        return get_support_kernels(name).permute(x, as_numbers, inverse=inverse)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        runs, inverse, name = ctx.call
        return _ByKernel.apply(gradient, runs, not inverse, name), None, None, None


def shard_batch(
    batch: Mapping[str, torch.Tensor],
    cp: CPContext,
    *,
    cu_seqlens: torch.Tensor | None = None,
    pad: bool = False,
) -> dict[str, torch.Tensor]:
    """This rank's part of a training batch for next-token prediction.

    Labels are shifted left by one BEFORE the cut, so that each token has the label of its true
    successor, which often lives on another rank; the last token of a sequence, and of each document
    in it, gets IGNORE_INDEX. `position_ids` are added unless the batch brings its own: global, or
    counted from the start of each document.

    Args:
        batch: tensors [B, S, ...], equal on all ranks. `labels`, if present, are the tokens
            themselves, not shifted (what Hugging Face models take). `segment_ids` [B, S], if
            present, say which tokens are one document. The reference length S is that of
            `input_ids`, or else of the first entry.
        cp: the context.
        cu_seqlens: packed documents as `ring_attention` takes them.
        pad: allow an S that does not divide. Padded labels are IGNORE_INDEX, all else is 0. Give
            `ring_attention` seq_len=S then.

    Returns:
        A new dict with every entry cut to [B, L, ...], and `position_ids` int64 [B, L].

    Raises:
        ValueError: an entry is no tensor or has no [B, S] in front, S does not fit the layout,
            labels are not signed integers, there are both `segment_ids` and `cu_seqlens`, or there
            is an `attention_mask` (a padding mask would not reach `ring_attention`).
    """
    validation.validate_flag("pad", pad)
    num_rows, seq_len = _check_batch(batch)
    if cu_seqlens is not None and "segment_ids" in batch:
        raise ValueError("segment_ids and cu_seqlens: expected at most one of them, got both")
    _slots(cp, seq_len, may_pad=pad)
    whole = dict(batch)
    device = next(iter(batch.values())).device
    positions = _positions(whole.get("segment_ids"), cu_seqlens, seq_len, device)
    if "labels" in whole:
        whole["labels"] = _next_token(whole["labels"], starts=positions == 0)
    if "position_ids" not in whole:
        whole["position_ids"] = positions.expand(num_rows, seq_len)
    return {
        key: shard(value, cp, pad_value=IGNORE_INDEX if key == "labels" else 0)
        for key, value in whole.items()
    }


def _check_batch(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """B and S of a batch that can be cut."""
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
    labels = batch.get("labels")
    if labels is not None and labels.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"expected labels of int16, int32 or int64, which can hold {IGNORE_INDEX}, "
            f"got {labels.dtype}; cast them"
        )
    return num_rows, seq_len


def _positions(
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_len: int,
    device: torch.device,
) -> torch.Tensor:
    """int64 [B or 1, S]: positions of tokens, from 0 on in each document."""
    if segment_ids is None:
        return position_ids(seq_len, cu_seqlens=cu_seqlens)[None].to(device)
    at = torch.arange(seq_len, device=device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return at - at.masked_fill(~starts, 0).cummax(1)[0]


def _next_token(labels_BS: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The token after each; none after the last of a document. starts: bool [B or 1, S]."""
    end = torch.full_like(labels_BS[:, :1], IGNORE_INDEX)
    following = labels_BS.masked_fill(starts.expand_as(labels_BS), IGNORE_INDEX)
    return torch.cat([following[:, 1:], end], dim=1)


def _check_dim(x: torch.Tensor, dim: int) -> None:
    """Raise ValueError unless x is a tensor that has this dim."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"expected a tensor, got {type(x).__name__}")
    if type(dim) is not int or not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim: expected the sequence dim of a tensor of {x.dim()} dims, got {dim!r}"
        )


def _check_value(pad_value: float, dtype: torch.dtype) -> None:
    """Raise ValueError where torch would round 0.5 to 0 among integers, or fold -100 into uint8."""
    holds = isinstance(pad_value, int | float)
    if holds and not (dtype.is_floating_point or dtype.is_complex):
        is_bool = dtype == torch.bool
        least, most = (0, 1) if is_bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        holds = least <= pad_value <= most and pad_value == int(pad_value)
    if not holds:
        raise ValueError(f"pad_value: expected a number that {dtype} holds, got {pad_value!r}")


def _slots(cp: CPContext, seq_len: int, *, may_pad: bool) -> int:
    """Slots of the whole sequence in this layout."""
    slots = padded_len(cp.layout, cp.size, seq_len)
    if slots != seq_len and not may_pad:
        multiple = seq_len_multiple(cp.layout, cp.size)
        raise ValueError(
            f"sequence length: expected a positive multiple of {multiple} ({cp.layout}, {cp.size} "
            f"ranks), got {seq_len}; pad it (shard with pad_value, shard_batch with pad=True) and "
            f"give ring_attention seq_len={seq_len}"
        )
    return slots


def _take(x: torch.Tensor, run: range, dim: int) -> torch.Tensor:
    """A view of the tokens of one run."""
    index = [slice(None)] * x.dim()
    index[dim] = slice(run.start, run.stop, run.step)
    return x[tuple(index)]


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)
