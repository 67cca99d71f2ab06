"""The loss and the gradients of the whole sequence from the parts that ranks hold.

Ranks hold different numbers of valid labels, so a mean of the ranks' means is not the mean over
tokens. Here each rank divides its own sum by the token count of the whole group: the SUM over ranks
is the loss, and the sum of the ranks' gradients is its gradient.

Not here: data parallelism, gradient clipping.
"""

import zlib
from collections.abc import Iterable
from typing import Literal

import torch

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.sharding import IGNORE_INDEX

BUCKET_BYTES = 25 * 2**20
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def token_mean_loss(
    per_token: torch.Tensor,
    labels: torch.Tensor,
    cp: CPContext,
    grad_average_over: int = 1,
) -> torch.Tensor:
    """This rank's share of the mean loss over all valid tokens of the group.

    A collective call: every rank makes it. Summed over ranks the shares are the loss:
    `cp.all_reduce(loss.detach())` is the number to log. With no valid label in the whole group
    the loss is 0 and so are its gradients.

    Args:
        per_token: loss of each token of this rank, any shape, floating point.
        labels: same number of elements; IGNORE_INDEX marks tokens that do not count.
        cp: the context.
        grad_average_over: factor on the result. Where an optimiser or wrapper (DDP, FSDP) averages
            gradients over n processes, give n; where gradients are summed, leave 1.

    Returns:
        A scalar, fp32 (fp64 for fp64 input), differentiable with respect to `per_token`.

    Raises:
        ValueError: sizes differ, the two are swapped, or `grad_average_over` is less than 1; on all
            ranks where it is so on one, or where that factor differs.
    """
    with cp.refusing("token_mean_loss"):
        _check(per_token, labels, grad_average_over)
    cp.agree_on("token_mean_loss", {"grad_average_over": grad_average_over})
    ignored = labels.reshape(-1) == IGNORE_INDEX
    count = cp.transport.all_reduce_sum((~ignored).sum()).clamp(min=1)
    dtype = torch.promote_types(per_token.dtype, torch.float32)
    total = per_token.reshape(-1).to(dtype).masked_fill(ignored, 0.0).sum()
    return total * grad_average_over / count


def allreduce_grads(
    params: Iterable[torch.nn.Parameter],
    cp: CPContext,
    op: Literal["sum", "mean"] = "sum",
) -> None:
    """Replace every gradient by its sum (or mean) over the group, in buckets.

    A collective call: every rank makes it, with the same parameters in the same order. A gradient
    that is None on some ranks counts as zero there; one that is None on all ranks stays None.
    16-bit gradients are summed in fp32 and rounded once.

    Args:
        params: parameters of the model.
        cp: the context.
        op: "sum" goes with `token_mean_loss(..., grad_average_over=1)`.

    Raises:
        ValueError: `op` is neither of the two, or a gradient is sparse; on all ranks where it is so
            on one, or where `op` or the parameters differ.
    """
    with cp.refusing("allreduce_grads"):
        if op not in ("sum", "mean"):
            raise ValueError(f'op: expected "sum" or "mean", got {op!r}')
        trained = _trained(params)
    if cp.size == 1:
        return
    cp.agree_on("allreduce_grads", {"op": op, "parameters": _fingerprint(trained)})
    if not trained:
        return
    present = torch.tensor([p.grad is not None for p in trained], device=trained[0].device)
    anywhere = cp.transport.all_reduce_sum(present.to(torch.int32)).tolist()
    with_grad = [p for p, ranks in zip(trained, anywhere, strict=True) if ranks > 0]
    factor = 1.0 / cp.size if op == "mean" else 1.0
    for bucket in _buckets(with_grad):
        _reduce_bucket(bucket, cp, factor)


def _check(per_token: torch.Tensor, labels: torch.Tensor, grad_average_over: int) -> None:
    """Raise ValueError for what `token_mean_loss` cannot add up."""
    for name, x in (("per_token", per_token), ("labels", labels)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if per_token.numel() != labels.numel():
        raise ValueError(
            f"expected one loss per label, got {list(per_token.shape)} losses and "
            f"{list(labels.shape)} labels; compute the loss with reduction='none'"
        )
    if not per_token.is_floating_point() or labels.dtype not in _INTEGERS:
        raise ValueError(
            f"expected losses in floating point and labels of integers, got {per_token.dtype} and "
            f"{labels.dtype}; losses come first"
        )
    validation.validate_count("grad_average_over", grad_average_over)


def _trained(params: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Those that take gradients, a tied one once. Raises ValueError for what cannot be reduced."""
    given = [*dict.fromkeys(params)]
    for index, p in enumerate(given):
        if not isinstance(p, torch.Tensor):
            raise ValueError(
                f"params: expected parameters, got {type(p).__name__} at {index}; pass "
                "model.parameters()"
            )
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"params: expected dense gradients, got {p.grad.layout} at {index}; use "
                "torch.nn.Embedding with sparse=False"
            )
    return [p for p in given if p.requires_grad]


def _fingerprint(params: list[torch.nn.Parameter]) -> str:
    """How many there are, and a few characters that differ where their shapes or dtypes do."""
    each = " ".join(f"{tuple(p.shape)} {p.dtype} {p.device.type}" for p in params)
    return f"{len(params)} (crc {zlib.crc32(each.encode()):08x})"


def _buckets(params: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Neighbours of one dtype and device, up to BUCKET_BYTES together."""
    buckets: list[list[torch.nn.Parameter]] = []
    size_bytes = 0
    for p in params:
        num_bytes = p.numel() * p.element_size()
        same = buckets and (buckets[-1][0].dtype, buckets[-1][0].device) == (p.dtype, p.device)
        if not same or size_bytes + num_bytes > BUCKET_BYTES:
            buckets.append([])
            size_bytes = 0
        buckets[-1].append(p)
        size_bytes += num_bytes
    return buckets


def _reduce_bucket(bucket: list[torch.nn.Parameter], cp: CPContext, factor: float) -> None:
    dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(dtype) for p in bucket]
    )
    flat = cp.transport.all_reduce_sum(flat.detach()).mul_(factor)
    for p, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        grad = piece.reshape(p.shape).to(p.dtype)
        if p.grad is None:
            p.grad = grad.clone()
        else:
            p.grad.copy_(grad)
