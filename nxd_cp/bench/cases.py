"""What is timed: one kernel on one block of scores; sweeps and presets of such cases.

Letters: S queries, K keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from nxd_cp.simulators.attention_block import KERNELS, AttentionBlock

# Matmuls of one (query, key) pair, 2 D flops each: scores and output; in the backward scores again,
# dP, dV, dK and dQ.
MATMULS = {"flash_fwd": 2, "flash_bwd": 5}


@dataclass(frozen=True)
class Case(AttentionBlock):
    """One kernel on one block, on one logical core (LNC physical ones)."""

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        if self.mask == "full":
            return self.queries * self.keys
        return self.queries * (self.queries + (1 if self.mask == "causal" else -1)) // 2

    @property
    def flops(self) -> float:
        """Flops of the matmuls over visible pairs; what a kernel does beyond that is its own."""
        return 2.0 * MATMULS[self.kernel] * self.head_dim * self.num_heads * self.num_pairs

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)

    @property
    def series(self) -> str:
        """What stays equal along a curve over lengths."""
        return (
            f"{self.kernel} {self.mask} {self.dtype} H{self.num_heads} G{self.num_kv_heads} "
            f"D{self.head_dim}"
        )

    def with_heads(self, times: int) -> Case:
        """The same case with `times` as many heads of both kinds."""
        return replace(
            self, num_heads=times * self.num_heads, num_kv_heads=times * self.num_kv_heads
        )

    def __str__(self) -> str:
        return f"{self.series} S{self.queries} K{self.keys}"

    def shortened(self, length: int) -> Case:
        """The same case with at most `length` queries and keys."""
        return replace(self, queries=min(self.queries, length), keys=min(self.keys, length))


def sweep(
    *,
    kernels: Sequence[str] = KERNELS,
    lengths: Sequence[int] = (512, 1024, 2048),
    masks: Sequence[str] = ("causal", "full"),
    head_dims: Sequence[int] = (128,),
    heads: Sequence[tuple[int, int]] = ((1, 1),),
    dtypes: Sequence[str] = ("bfloat16",),
) -> list[Case]:
    """Every combination. Raises ValueError for a case that no kernel takes."""
    return [
        Case(kernel, length, length, mask, h, g, dim, dtype)
        for kernel, dtype, (h, g), dim, mask, length in product(
            kernels, dtypes, heads, head_dims, masks, lengths
        )
    ]


def preset(name: str) -> list[Case]:
    """ "quick": 4 cases. "standard": both kernels, both masks, four lengths, and grouped heads.
    "wide": also head dims and fp32. Raises ValueError for another name.
    """
    if name == "quick":
        return sweep(lengths=(512, 1024), masks=("causal",))
    standard = sweep(lengths=(256, 512, 1024, 2048))
    standard += sweep(lengths=(512, 1024), masks=("causal",), heads=((4, 1),))
    if name == "standard":
        return standard
    if name == "wide":
        return [
            *standard,
            *sweep(lengths=(512, 1024, 2048), masks=("causal",), head_dims=(64, 80)),
            *sweep(lengths=(512, 1024), masks=("causal",), dtypes=("float32",)),
            *sweep(lengths=(4096,), masks=("causal", "full")),
        ]
    raise ValueError(f"preset: expected quick, standard or wide, got {name!r}")
