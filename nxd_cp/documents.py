"""Packed documents: from cumulative lengths to the ids that each rank's tokens carry.

Does: check `cu_seqlens` and turn it into document ids and positions for every layout. Does not:
mask (`backends/`), or exchange ids (`ring.gather`).

cu_seqlens: [documents + 1], integers, 0 first, never falling; document i holds the positions
cu_seqlens[i] to cu_seqlens[i + 1] - 1 of the whole sequence, in every row of the batch.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from nxd_cp.schedule import Plan, token_runs


def validate_values(cu_seqlens: Tensor | None, plan: Plan) -> None:
    """Raise ValueError unless the lengths begin at 0, never fall and end with the sequence."""
    if cu_seqlens is None:
        return
    values = cu_seqlens.cpu()
    if int(values[0]) != 0 or bool((values[1:] < values[:-1]).any()):
        raise ValueError(
            "cu_seqlens: expected 0 first and values that never fall, got "
            f"{_shortened(values.tolist())}"
        )
    if int(values[-1]) != plan.num_tokens:
        raise ValueError(
            f"cu_seqlens: expected {plan.num_tokens} last (the tokens of the whole sequence), got "
            f"{int(values[-1])}; give the same cu_seqlens to all ranks, and the length without "
            "padding as seq_len"
        )


def fingerprint(cu_seqlens: Tensor | None) -> str:
    """A few characters that differ where two ranks were given different lengths."""
    if cu_seqlens is None:
        return "None"
    values = cu_seqlens.detach().cpu().long().tolist()
    return f"{len(values) - 1} documents, crc {zlib.crc32(repr(values).encode()):08x}"


def ids_of_ranks(cu_seqlens: Tensor, plan: Plan, device: torch.device) -> list[Tensor]:
    """For each rank the document of each of its slots, int64 [1, S]; padding counts as the last."""
    ids = []
    for rank in range(plan.size):
        positions = slot_positions(plan.layout, plan.size, rank, plan.seq_len).to(device)
        ids.append(ids_of_positions(cu_seqlens.to(device), positions)[None])
    return ids


def ids_of_positions(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """The document, from 0 on, that holds each of these positions of the whole sequence."""
    return torch.searchsorted(
        cu_seqlens[1:].contiguous(), positions.to(cu_seqlens.dtype), right=True
    )


def slot_positions(layout: str, size: int, rank: int, seq_len: int) -> Tensor:
    """Positions of the slots that a rank holds, int64 [S], in local order."""
    runs = token_runs(layout, size, rank, seq_len)
    return torch.cat([torch.arange(run.start, run.stop, run.step) for run in runs])


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
