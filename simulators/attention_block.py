"""One block of attention on one core, as our kernels take it: integers and names, checked.

Needs nothing, so that what times kernels on a device and what times them in the simulator can say
it alike.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("flash_fwd", "flash_bwd")
MASKS = ("full", "causal", "strict")
DTYPES = ("bfloat16", "float32")
ROWS = 128  # of a tile
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionBlock:
    """Raises ValueError for a block that no kernel takes."""

    kernel: str = "flash_fwd"
    queries: int = 1024
    keys: int = 1024
    mask: str = "causal"
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kernel", self.kernel, KERNELS),
            ("mask", self.mask, MASKS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if min(self.queries, self.keys) < ROWS or self.queries % ROWS or self.keys % ROWS:
            raise ValueError(
                f"queries and keys: expected multiples of {ROWS}, got {self.queries} and "
                f"{self.keys}"
            )
        if self.mask != "full" and self.queries != self.keys:
            raise ValueError(
                f"queries and keys: expected equal lengths under a {self.mask} mask, "
                f"got {self.queries} and {self.keys}"
            )
        least = min(self.num_heads, self.num_kv_heads, self.head_dim)
        if least < 1 or self.num_heads % self.num_kv_heads or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                "heads and head dim: expected key/value heads that divide query heads and a head "
                f"dim of at most {MAX_HEAD_DIM}, got {self.num_heads} and {self.num_kv_heads} of "
                f"dim {self.head_dim}"
            )
