"""One rank's part of the keys and values of one layer.

Does: store tokens with their positions, row by row of the batch, so that rows and ranks may hold
different numbers of them. Does not: decide which rank stores a token (`decode.py`, `prefill.py`),
or communicate.

Letters: B batch, Hkv key/value heads, N new tokens, C capacity, D and Dv head dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nxd_cp import validation

EMPTY = -1  # position of a slot without a token


class KVCache:
    """Keys and values of some tokens of each sequence, in any order.

    Args:
        batch, num_kv_heads, head_dim: shape of the keys [B, Hkv, C, D].
        capacity: tokens of one sequence that this rank can hold.
        v_head_dim: head dim of the values, default `head_dim`.

    Attributes:
        k, v: [B, Hkv, C, D] and [B, Hkv, C, Dv]. positions: [B, C] int64, `EMPTY` where a slot is
        free. num_used: [B] int64, slots of this rank in use. next_position: [B] int64, tokens of
        each sequence that are stored on all ranks together; equal on all ranks.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in (sizes | {"capacity": capacity, "v_head_dim": v_head_dim}).items():
            validation.validate_count(name, size)
        if dtype not in validation.DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        front = (batch, num_kv_heads, capacity)
        self.capacity = capacity
        self.k = torch.zeros(*front, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*front, v_head_dim, dtype=dtype, device=device)
        self.positions = torch.full((batch, capacity), EMPTY, device=device)
        self.num_used = torch.zeros(batch, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def num_slots(self) -> int:
        """Slots in use by the fullest sequence: those that need to be read."""
        return int(self.num_used.max())

    def check_room(self, positions: Tensor) -> None:
        """Raise ValueError when these tokens, [B, N] (`EMPTY` for none), do not fit."""
        wanted = int((self.num_used + (positions != EMPTY).sum(1)).max())
        if wanted > self.capacity:
            raise ValueError(
                f"cache: expected at most {self.capacity} tokens of a sequence on this rank, got "
                f"{wanted}; make it with a larger capacity"
            )

    def store(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Put tokens [B, Hkv, N, D] at these positions [B, N]; those at `EMPTY` are left out."""
        self.check_room(positions)
        keep = positions != EMPTY
        row, token = keep.nonzero(as_tuple=True)
        slot = (self.num_used[:, None] + keep.long().cumsum(1) - 1)[row, token]
        self.k[row, :, slot] = k[row, :, token]
        self.v[row, :, slot] = v[row, :, token]
        self.positions[row, slot] = positions[row, token]
        self.num_used += keep.sum(1)

    @contextmanager
    def kept_if_done(self) -> Iterator[None]:
        """What is stored in the block stays if it ends well; after an error the cache is as before,
        so that a call may be made again.
        """
        before = self.num_used.clone(), self.next_position.clone()
        try:
            yield
        except BaseException:
            self.num_used, self.next_position = before
            slots = torch.arange(self.capacity, device=self.positions.device)
            self.positions.masked_fill_(slots >= self.num_used[:, None], EMPTY)
            raise

    def used(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of k, v and positions, of the slots that any sequence uses."""
        count = self.num_slots
        return self.k[:, :, :count], self.v[:, :, :count], self.positions[:, :count]
