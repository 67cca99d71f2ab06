"""The NKI kernels as a backend: "nki" on a Neuron device, "simulate" on a CPU, the same source.

Checks on the host everything that the kernels assume, so that a kernel never sees a shape it
cannot take. Not here: which block to compute (the schedule), merging blocks (ring.py).

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask
from nxd_cp.schedule import Plan, Tile

ROWS = 128  # one tile of the kernels: lengths are multiples of it
MAX_HEAD_DIM = 128  # the contraction of one matmul: the partition count
DTYPES = (torch.bfloat16, torch.float32)
SBUF_BYTES = 160 * 1024  # per partition, for the tiles that stay; gen2 has 176 KiB in all


class KernelBackend:
    """Block attention by the NKI kernels.

    Args:
        name: "simulate" or "nki".
        generation: chip that "simulate" imitates, "gen2" (trn1, inf2), "gen3" (trn2) or "gen4"
            (trn3); default the one named by NEURON_PLATFORM_TARGET_OVERRIDE, or else gen4.
    """

    def __init__(self, name: str, generation: str | None = None) -> None:
        self.name = name
        self._fwd, self._bwd = _load_kernels(name, generation)

    def validate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan,
        rank: int,
        softcap: float | None = None,
        documents: bool = False,
    ) -> None:
        """Raise ValueError for anything that the kernels cannot take.

        q: [B, H, S, D]; k, v: [B, G, S, D]; every tile of `plan.tiles(rank)` will be executed.
        """
        for label, given in (("softcap", softcap is not None), ("documents", documents)):
            if given:
                raise ValueError(
                    f'backend "{self.name}": expected no {label}, got some; use backend="torch"'
                )
        for label, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype not in DTYPES or x.dtype != q.dtype:
                raise ValueError(
                    f'backend "{self.name}": expected q, k and v all bfloat16 or all float32, '
                    f"got {label} in {x.dtype}; cast it"
                )
        dims = (q.shape[-1], v.shape[-1])
        if dims[0] > MAX_HEAD_DIM or dims[0] != dims[1]:
            raise ValueError(
                f'backend "{self.name}": expected one head dim of at most {MAX_HEAD_DIM} for q, k '
                f'and v, got {dims[0]} and {dims[1]}; use backend="torch"'
            )
        if plan.window is not None:
            raise ValueError(
                f'backend "{self.name}": expected causal or full attention, got window='
                f'{plan.window}; use backend="torch"'
            )
        for tile in plan.tiles(rank):
            self._validate_tile(q, k, tile)

    def _validate_tile(self, q: Tensor, k: Tensor, tile: Tile) -> None:
        """A mask that has a name, whole rows of tiles, and room in SBUF for what stays there.

        The backward keeps three copies of one head's keys and values, and dq of one group in fp32.
        """
        if not isinstance(tile.mask, str):
            raise ValueError(
                f'backend "{self.name}": expected rectangles that are full, causal or strict, got '
                f'{tile}; use as many keys as queries, or backend="torch"'
            )
        for label, length in (("query", tile.q_len), ("key", tile.k_len)):
            if length % ROWS:
                raise ValueError(
                    f'backend "{self.name}": expected {label} blocks of a multiple of {ROWS} rows, '
                    f'got {length}; pad the sequence or use backend="torch"'
                )
        heads_per_group = q.shape[1] // k.shape[1]
        key_bytes = 3 * tile.k_len * q.element_size()
        dq_bytes = heads_per_group * (tile.q_len // ROWS) * q.shape[-1] * 4
        if key_bytes + dq_bytes > SBUF_BYTES:
            raise ValueError(
                f'backend "{self.name}": expected at most {SBUF_BYTES} bytes of SBUF per partition '
                f"for one group of query heads, got {key_bytes + dq_bytes} ({tile.k_len} keys, "
                f"{heads_per_group} heads x {tile.q_len} rows); use more ranks"
            )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: BlockMask,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block: o [B, H, S, D] and lse [B, H, S], both fp32; empty rows give 0 and -inf."""
        inputs = (x.contiguous() for x in (q, k, v))
        o, lse = self._fwd.flash_fwd(*inputs, mask, scale)
        lse = lse.squeeze(-1)
        empty = lse < 0.5 * scale * self._fwd.EMPTY_ROW_MAX
        return o, lse.masked_fill(empty, float("-inf"))

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor,
        *,
        mask: BlockMask,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block: dq [B, H, S, D], dk and dv [B, G, K, D], all fp32; `o` is not read."""
        lse = lse.masked_fill(lse == float("-inf"), self._bwd.EMPTY_ROW_LSE)
        inputs = (do.to(q.dtype), q, k, v, lse.unsqueeze(-1), delta.unsqueeze(-1))
        return self._bwd.flash_bwd(*(x.contiguous() for x in inputs), mask, scale)


def has_nki() -> bool:
    """Whether a real `nki` can be imported: neither PyPI's placeholder nor our simulator counts."""
    try:
        nki = importlib.import_module("nki")
    except ImportError:
        return False
    return hasattr(nki, "jit") and not getattr(nki, "__simulated__", False)


def _load_kernels(name: str, generation: str | None) -> tuple[Any, Any]:
    """The modules of the forward and the backward kernel, bound to the device or the simulator."""
    if name == "simulate":
        from nxd_cp.simulators.nki_api import load

        kernels = load("nxd_cp.kernels", generation=generation)
        return kernels.flash_fwd, kernels.flash_bwd
    if generation is not None:
        raise ValueError(
            f'expected no generation for backend "{name}", got {generation!r}: the device has its '
            'own; use backend "simulate"'
        )
    if not has_nki():
        raise ValueError(
            'backend "nki" needs the nki package of the AWS Neuron SDK, which cannot be imported '
            'here (the package of that name on PyPI is a placeholder); use backend="simulate" '
            'or backend="torch"'
        )
    fwd = importlib.import_module("nxd_cp.kernels.flash_fwd")
    bwd = importlib.import_module("nxd_cp.kernels.flash_bwd")
    return fwd, bwd
