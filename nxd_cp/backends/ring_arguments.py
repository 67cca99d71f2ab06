"""Arguments of the kernels that run the whole ring on the device (`ring_fwd`, `ring_bwd`).

Does: check every limit of these kernels on the host, and bring tensors into their shapes. Does not:
launch them (`nxd_cp/device_ring.py`). The ring that the host drives has none of these limits.

Letters: B batch, H query heads, G key/value heads, C chunks, S rows of a chunk, D, E head dims.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends import kernel_limits as limits

HOST_RING = 'use the ring that the host drives, backend="nki" or "simulate"'


def forward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: tuple[tuple[int, ...], ...],
    causal: bool,
    scale: float,
    softcap: float | None = None,
    generation: str | None = None,
    cores: int = 1,
) -> tuple[Any, ...]:
    """Positional arguments of `ring_fwd` for one rank.

    q [B, H, rows, D], k [B, G, rows, D] and v [B, G, rows, E] are the rank's own: its two zigzag
    chunks one after the other where `causal`, else any part of the sequence. groups: ranks by
    group, all of one length; the runtime orders each ring. generation: the chip's, if known.
    cores: of a rank (LNC).
    """
    _check(q, k, v, groups, causal, scale, softcap, generation)
    _check_cores(q, k, generation, cores)
    size, chunks = len(groups[0]), 2 if causal else 1
    rank = torch.arange(size)
    sides = (rank[None, :] > rank[:, None]).int()
    tensors = tuple(by_chunk(x, chunks) for x in (q, k, v))
    return (*tensors, sides, groups, "causal" if causal else "full", scale, softcap or 0.0)


def backward_arguments(
    do: Tensor, lse: Tensor, delta: Tensor, forward: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Positional arguments of `ring_bwd`: those of `ring_fwd`, and what the backward adds.

    do [B, H, rows, E]; lse, delta [B, H, rows] fp32, over all ranks.
    """
    q, k, v, *rest = forward
    chunks = q.shape[2]
    rows = tuple(by_chunk(x.unsqueeze(-1), chunks) for x in (lse, delta))
    return (by_chunk(do.to(q.dtype), chunks), q, k, v, *rows, *rest)


def by_chunk(x: Tensor, chunks: int) -> Tensor:
    """[B, H, rows, D] as [B, H, C, S, D]."""
    return x.contiguous().unflatten(2, (chunks, -1))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[tuple[int, ...], ...],
    causal: bool,
    scale: float,
    softcap: float | None,
    generation: str | None,
) -> None:
    """Raise ValueError for what the ring kernels cannot take."""
    limits.check_block("device ring", q, k, v, "full")
    limits.check_numbers("device ring", scale, softcap)
    if generation == "gen2":
        raise ValueError(
            f"device ring: expected gen3 (trn2) or later, got gen2, which has no implicit ring; "
            f"{HOST_RING}"
        )
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise ValueError(
            f"device ring: expected groups of one length, got {sorted(sizes)}; give every ring as "
            "many ranks"
        )
    rows = q.shape[2]
    if k.shape[2] != rows or v.shape[2] != rows:
        raise ValueError(
            f"device ring: expected as many keys as queries on a rank, got {k.shape[2]} and "
            f"{rows}; {HOST_RING}"
        )
    if causal and rows % 2:
        raise ValueError(
            f"device ring: expected an even number of rows (two zigzag chunks), got {rows}; pad "
            "the batch"
        )
    _check_size(q, k, v, sizes.pop(), causal, softcap)


def _check_cores(q: Tensor, k: Tensor, generation: str | None, cores: int) -> None:
    limits.check_cores("device ring", generation, cores)
    pairs = q.shape[0] * k.shape[1]
    if pairs % cores:
        raise ValueError(
            f"device ring: expected batch x key/value heads that the {cores} cores of a rank can "
            f"share, got {pairs}; use one core per rank (LNC1), or {HOST_RING}"
        )


def _check_size(
    q: Tensor, k: Tensor, v: Tensor, size: int, causal: bool, softcap: float | None
) -> None:
    """SBUF of one rectangle, and instructions of all steps: one program holds them all."""
    rows = q.shape[2] // (2 if causal else 1)
    heads = q.shape[1] // k.shape[1]
    launch = limits.Launch(
        heads, rows, rows, q.shape[3], v.shape[3], q.element_size(), "full", softcap is not None
    )
    used = max(limits.forward_bytes(launch), limits.backward_bytes(launch))
    if used > limits.SBUF_BYTES:
        raise ValueError(
            f"device ring: expected at most {limits.SBUF_BYTES} bytes of SBUF per partition, got "
            f"{used} ({heads} heads x {rows} rows of a chunk); use more ranks, or {HOST_RING}"
        )
    pairs = q.shape[0] * k.shape[1]
    rectangles = 2 * size - 1 if causal else size
    square = replace(launch, mask="causal")
    length = rectangles * limits.backward_instructions(launch)
    length += 2 * limits.backward_instructions(square) * causal
    if pairs * length > limits.MAX_INSTRUCTIONS:
        raise ValueError(
            f"device ring: expected at most {limits.MAX_INSTRUCTIONS} instructions in one program, "
            f"got about {pairs * length} ({pairs} x {rectangles} rectangles); use fewer heads per "
            f"rank, or {HOST_RING}"
        )
