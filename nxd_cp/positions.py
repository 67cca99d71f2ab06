"""Positions of a rank's tokens, which documents they belong to, and the tables of RoPE.

Does: say for the slots of a rank, or for the whole sequence, where they stand. Does not: cut
tensors (`sharding.py`), or rotate (the model does).

Positions count from the start of the sequence, or of each document. Slots behind the last token
count on; nothing reads them.

Letters: L slots of a rank, D head dim. Source: RoFormer (arXiv 2104.09864) for the tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nxd_cp import validation
from nxd_cp.context import CPContext
from nxd_cp.documents import ids_of_positions, slot_positions
from nxd_cp.schedule import padded_len


def position_ids(
    seq_len: int, cp: CPContext | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """int64 [L]: positions of this rank's slots; without a context of the whole sequence.

    seq_len: tokens of the whole sequence, any number. cu_seqlens: packed documents as
    `ring_attention` takes them; positions then count from the start of each.
    Raises ValueError when cu_seqlens does not go from 0 to `seq_len`.
    """
    positions = _of_slots(seq_len, cp)
    if cu_seqlens is None:
        return positions
    ends = _checked(cu_seqlens, seq_len)
    return positions - ends[ids_of_positions(ends, positions.clamp(max=seq_len - 1))]


def segment_ids(cu_seqlens: Tensor, cp: CPContext | None = None) -> Tensor:
    """int64 [L]: the document, from 0 on, of each of this rank's slots.

    For models that take ids; `ring_attention` takes cu_seqlens itself.
    """
    ends = _checked(cu_seqlens, None)
    seq_len = int(ends[-1])
    return ids_of_positions(ends, _of_slots(seq_len, cp).clamp(max=seq_len - 1))


def rope_tables(
    positions: Tensor, head_dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D / 2], fp32, of positions [...].

    Angles are formed in fp64: in fp32 those of position 2 ** 20 would be wrong by 0.06 radians.
    Raises ValueError for an odd head dim, and a theta that is not positive.
    """
    if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim!r}")
    is_number = isinstance(theta, int | float) and not isinstance(theta, bool)
    if not is_number or not 0 < theta < math.inf:
        raise ValueError(f"theta: expected a positive number, got {theta!r}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * theta ** (-exponents / head_dim)
    return angles.cos().float(), angles.sin().float()


def _of_slots(seq_len: int, cp: CPContext | None) -> Tensor:
    validation.validate_count("seq_len", seq_len)
    if cp is None:
        return torch.arange(seq_len)
    return slot_positions(cp.layout, cp.size, cp.rank, padded_len(cp.layout, cp.size, seq_len))


def _checked(cu_seqlens: Tensor, seq_len: int | None) -> Tensor:
    """int64 on the CPU; they end with seq_len, where that is given."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in validation.INTEGERS:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected an int32 or int64 tensor, got {got}")
    ends = cu_seqlens.detach().cpu().long()
    whole = ends.dim() == 1 and len(ends) >= 2 and int(ends[0]) == 0
    if not whole or (seq_len is not None and int(ends[-1]) != seq_len):
        end = "the number of tokens" if seq_len is None else seq_len
        raise ValueError(
            f"cu_seqlens: expected [documents + 1] values from 0 to {end}, got {ends.tolist()}"
        )
    if bool((ends[1:] < ends[:-1]).any()):
        raise ValueError(f"cu_seqlens: expected values that never fall, got {ends.tolist()}")
    return ends
