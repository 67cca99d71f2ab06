"""The NKI kernels as a backend: "nki" on a Neuron device, "simulate" on a CPU, the same source.

Does: check on the host everything that the kernels assume, turn masks into what they read, cut a
rectangle into launches that fit, and join the results. Does not: choose the rectangles (the
schedule), or merge those of different hops, unless it is given a carry.

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim of q and k,
E head dim of v; P (batch, key/value head) pairs and N query heads of each, as the kernels see them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends import kernel_limits as limits
from nxd_cp.backends.base import BlockMask
from nxd_cp.backends.device_ops import DeviceModule
from nxd_cp.backends.kernel_blocks import Block, split
from nxd_cp.backends.kernel_masks import Bounds, KernelMask, kernel_masks
from nxd_cp.schedule import Plan

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class KernelBackend:
    """Block attention by the NKI kernels.

    Args:
        name: "simulate" or "nki".
        generation: chip that "simulate" imitates, "gen2" (trn1, inf2), "gen3" (trn2) or "gen4"
            (trn3); default the one named by NEURON_PLATFORM_TARGET_OVERRIDE, or else gen4.
        cores: physical cores per launch (LNC), 1, or 2 from gen3; they share the heads.
        score_bound: a promise that every scaled score lies within +-score_bound, at most 32 (as
            with normalised queries and keys); the forward then needs no pass for row maxima.
    """

    def __init__(
        self,
        name: str,
        generation: str | None = None,
        *,
        cores: int = 1,
        score_bound: float | None = None,
    ) -> None:
        limits.check_cores(name, generation, cores)
        limits.check_score_bound(name, score_bound, None)
        self.name, self.cores, self.score_bound = name, cores, score_bound
        self._fwd, self._bwd, tiles = _load_kernels(name, generation)
        self._empty_lse: float = tiles.EMPTY_LSE
        self._empty_lse_limit: float = tiles.EMPTY_LSE_LIMIT

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

        q: [B, H, S, D]; k: [B, G, K, D]; v: [B, G, K, E]; every tile of `plan.tiles(rank)` will be
        executed, within documents where `documents` says so.
        """
        limits.check_tensors(self.name, q, k, v)
        limits.check_score_bound(self.name, self.score_bound, q.dtype)
        limits.check_numbers(self.name, 1.0, softcap)
        limits.shares(self.name, self.cores, q.shape[0] * k.shape[1], q.shape[1] // k.shape[1])
        for tile in plan.tiles(rank):
            if documents or not isinstance(tile.mask, str):
                limits.check_lengths(self.name, tile.q_len, tile.k_len)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: BlockMask,
        scale: float,
        softcap: float | None = None,
        carry: Pair | None = None,
    ) -> Pair:
        """One block: o [B, H, S, E] and lse [B, H, S], both fp32; empty rows give 0 and -inf.

        carry: (o, lse) over other keys of the same rows; the result is then over both. A learnable
        sink is the carry (0, sink).
        """
        cut = self._prepare(q, k, v, mask, scale, softcap)
        q_P, k_P, v_P = cut.queries(q), cut.keys(k), cut.keys(v)
        empty = self._empty_lse
        if carry is None:
            o = q.new_zeros((*q_P.shape[:-1], v.shape[-1]), dtype=torch.float32)
            lse = o.new_full((*q_P.shape[:-1], 1), empty)
        else:
            o = cut.queries(carry[0].float().clone())
            lse = cut.queries(carry[1].float().clamp_min(empty).unsqueeze(-1))
        kernel = self._fwd.flash_fwd if self.cores == 1 else self._fwd.flash_fwd[self.cores]
        begun: set[tuple[int, ...]] = set()
        for block, bounds in cut.launches():
            at = block.groups, block.heads, block.rows
            first = carry is None and not begun & {block.corner}
            inputs = (q_P[at], k_P[block.groups, :, block.keys], v_P[block.groups, :, block.keys])
            o[at], lse[at] = kernel(
                *_dense(inputs),
                block.mask,
                scale,
                softcap=softcap or 0.0,
                shift="row_max" if self.score_bound is None else "none",
                carry=() if first else _dense((o[at], lse[at])),
                bounds=bounds,
            )
            begun.add(block.corner)
        o, lse = o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])
        return o, lse.masked_fill(lse <= self._empty_lse_limit, float("-inf"))

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
        carry: Triple | None = None,
    ) -> Triple:
        """One block: dq [B, H, S, D], dk [B, G, K, D] and dv [B, G, K, E], fp32; `o` is not read.

        lse, delta [B, H, S] are those of whole rows, sinks included. carry: gradients of other
        blocks, in the shapes of the results, to which these are added.
        """
        cut = self._prepare(q, k, v, mask, scale, softcap)
        q_P, do_P, k_P, v_P = cut.queries(q), cut.queries(do.to(q.dtype)), cut.keys(k), cut.keys(v)
        lse_P = cut.queries(lse.clamp_min(self._empty_lse).unsqueeze(-1))
        delta_P = cut.queries(delta.unsqueeze(-1))
        if carry is None:
            dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q_P, k_P, v_P))
        else:
            dq, dk, dv = cut.queries(carry[0]).clone(), cut.shared(carry[1]), cut.shared(carry[2])
        launches = cut.launches()
        adds = carry is not None or len(launches) > 1
        kernel = self._bwd.flash_bwd if self.cores == 1 else self._bwd.flash_bwd[self.cores]
        for block, bounds in launches:
            at, keys = (
                (block.groups, block.heads, block.rows),
                (block.groups, slice(None), block.keys),
            )
            rows = (do_P[at], q_P[at], k_P[keys], v_P[keys], lse_P[at], delta_P[at])
            dq[at], dk[keys], dv[keys] = kernel(
                *_dense(rows),
                block.mask,
                scale,
                softcap=softcap or 0.0,
                carry=_dense((dq[at], dk[keys], dv[keys])) if adds else (),
                bounds=bounds[:2],
            )
        return dq.reshape(q.shape), cut.sum_keys(dk, k), cut.sum_keys(dv, v)

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None
    ) -> _Cut:
        limits.check_tensors(self.name, q, k, v)
        limits.check_numbers(self.name, scale, softcap)
        limits.check_score_bound(self.name, self.score_bound, q.dtype)
        num_pairs, heads = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        shares = limits.shares(self.name, self.cores, num_pairs, heads)
        return _Cut(q, k, v, kernel_masks(mask, q, k), shares, self.cores, softcap is not None)


class _Cut:
    """A rectangle as the kernels see it, one key/value head at a time, and its launches.

    shares: how many pairs a key/value head is repeated as, so that two cores have an even number.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: list[KernelMask],
        shares: int,
        cores: int,
        softcap: bool,
    ) -> None:
        self.masks, self.shares, self.cores = masks, shares, cores
        self.num_pairs = q.shape[0] * k.shape[1] * shares
        self.launch = limits.Launch(
            heads=q.shape[1] // k.shape[1] // shares,
            rows=q.shape[2],
            keys=k.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            itemsize=q.element_size(),
            mask=masks[0].word,
            softcap=softcap,
        )

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, S, ...] as [P, N, S, ...]; a key/value head's query heads lie together."""
        return x.reshape(self.num_pairs, self.launch.heads, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        """[B, G, K, ...] as [P, 1, K, ...]."""
        return x.flatten(0, 1).repeat_interleave(self.shares, dim=0).unsqueeze(1)

    def shared(self, x: Tensor) -> Tensor:
        """As `keys`, a new tensor whose shares of a head add up to it."""
        return self.keys(x) / self.shares

    def sum_keys(self, x: Tensor, like: Tensor) -> Tensor:
        """[P, 1, K, ...] back as [B, G, K, ...], summed over the shares of a head."""
        return x.reshape(*like.shape[:2], self.shares, *like.shape[2:]).sum(2)

    def launches(self) -> list[tuple[Block, tuple[Tensor, ...]]]:
        """Blocks and the `bounds` of each, without those in which nothing is visible."""
        blocks = split(self.launch, self.num_pairs, self.cores)
        return [
            (block, self._bounds(mask.bounds, block))
            for mask in self.masks
            for block in blocks
            if mask.bounds is None or not mask.bounds.is_empty(block, self.num_pairs)
        ]

    def _bounds(self, bounds: Bounds | None, block: Block) -> tuple[Tensor, ...]:
        return () if bounds is None else bounds.within(block, self.num_pairs)


def _dense(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def has_nki() -> bool:
    """Whether a real `nki` can be imported: neither PyPI's placeholder nor our simulator counts."""
    try:
        nki = importlib.import_module("nki")
    except ImportError:
        return False
    return hasattr(nki, "jit") and not getattr(nki, "__simulated__", False)


def _load_kernels(name: str, generation: str | None) -> tuple[Any, Any, Any]:
    """The modules of both kernels and of what they share, bound to the device or the simulator."""
    if name == "simulate":
        from nxd_cp.simulators.nki_api import load

        kernels = load("nxd_cp.kernels", generation=generation)
        return kernels.flash_fwd, kernels.flash_bwd, kernels.tiles
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
    names = ("flash_fwd", "flash_bwd", "tiles")
    fwd, bwd, tiles = (importlib.import_module(f"nxd_cp.kernels.{name}") for name in names)
    return DeviceModule(fwd, "flash_fwd"), DeviceModule(bwd, "flash_bwd"), tiles
