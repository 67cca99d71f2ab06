"""The NKI kernels as a backend: "nki" on a Neuron device, "simulate" on a CPU, the same source.

Does: check on the host everything that the kernels assume, and launch them block by block; each
takes what the one before it left. Does not: choose the rectangles (the schedule), cut one into
launches (`kernel_cut.py`), or turn masks into what the kernels read (`kernel_masks.py`).

Letters: B batch, H query heads, G key/value heads, S query rows, K keys, D head dim of q and k,
E head dim of v; P (batch, key/value head) pairs and N query heads of each, as the kernels see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends import kernel_limits as limits
from nxd_cp.backends.base import Carry, Pair, QueryRows, Scores
from nxd_cp.backends.kernel_blocks import Block
from nxd_cp.backends.kernel_cut import Cut, Found, dense, no_rows
from nxd_cp.backends.kernel_loops import LoopKernels
from nxd_cp.backends.kernel_modules import generation_of, has_nki, kernel_module
from nxd_cp.backends.kernel_support import SupportKernels
from nxd_cp.schedule import Plan

__all__ = ["KernelBackend", "has_nki"]

Triple = tuple[Tensor, Tensor, Tensor]


class KernelBackend:
    """Block attention by the NKI kernels.

    Args:
        name: "simulate" or "nki".
        generation: chip that "simulate" imitates, "gen2" (trn1, inf2), "gen3" (trn2) or "gen4"
            (trn3); default the one named by NEURON_PLATFORM_TARGET_OVERRIDE, or else gen4.
        cores: physical cores per launch (LNC), 1, or 2 from gen3; they share the heads.
        score_bound: a promise that every scaled score lies within +-score_bound, at most 27 (as
            with normalised queries and keys); the forward then needs no pass for row maxima.
        device_loops: whether masks of windows and documents run as loops on the device, which skip
            at run time what nobody sees (NKI 0.6); otherwise every tile of a block is computed.
    """

    carries = True

    def __init__(
        self,
        name: str,
        generation: str | None = None,
        *,
        cores: int = 1,
        score_bound: float | None = None,
        device_loops: bool = False,
    ) -> None:
        generation = generation_of(name, generation)
        limits.check_cores(name, generation, cores)
        limits.check_score_bound(name, score_bound, None)
        self.name, self.cores, self.score_bound = name, cores, score_bound
        self._fwd = kernel_module(name, generation, "flash_fwd")
        self._bwd = kernel_module(name, generation, "flash_bwd")
        tiles = kernel_module(name, generation, "tiles")
        self._empty_lse: float = tiles.EMPTY_LSE
        self._empty_lse_limit: float = tiles.EMPTY_LSE_LIMIT
        self._loops = LoopKernels(name, generation, cores) if device_loops else None
        self._support = SupportKernels(name, generation, cores=cores)

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
        scores: Scores,
        carry: Carry | None = None,
        out: Pair | None = None,
    ) -> Triple:
        """One block: o [B, H, S, E] and lse [B, H, S], both fp32; empty rows give 0 and -inf.

        Beside them the statistics [B, H, S, 2] fp32, w and L of `kernels/flash_fwd.py`.
        carry: what was returned over other keys of the same rows, or a finished (o, lse); the
        result is then over both. A learnable sink is (0, sink). out: kernels write new tensors.
        """
        cut = self._prepare(q, k, v, scores)
        q_P, k_P, v_P = cut.queries(q), cut.keys(k), cut.keys(v)
        before = no_rows(q_P, v.shape[-1], self._empty_lse)
        if carry is not None:
            before = self._carried(cut, q, v, carry)
        found: Found = {}
        for block, bounds in cut.launches():
            at, keys = block.queries, block.key_rows
            last = () if carry is None else (before[0][at], before[2][at])
            if block.corner in found:
                _, (o, _, statistics) = found[block.corner]
                last = o, statistics
            rows = self._forward_kernel(block)(
                *dense(q_P[at], k_P[keys], v_P[keys]),
                block.mask,
                scores.scale,
                softcap=scores.softcap or 0.0,
                shift="row_max" if self.score_bound is None else "none",
                carry=dense(*last),
                bounds=bounds,
            )
            found[block.corner] = block, rows
        o, lse, statistics = cut.join(found, before)
        o, lse = o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])
        lse = lse.masked_fill(lse <= self._empty_lse_limit, float("-inf"))
        return o, lse, statistics.reshape(*q.shape[:-1], 2)

    def as_carry(self, o: Tensor, lse: Tensor) -> Triple:
        """(o, lse) with its statistics: w = lse and L = 1."""
        w = lse.float().clamp_min(self._empty_lse)
        return o, lse, torch.stack((w, torch.ones_like(w)), dim=-1)

    def _carried(self, cut: Cut, q: Tensor, v: Tensor, carry: Carry) -> Triple:
        """A carry in the kernels' shapes; its rows are those of q."""
        o, lse, statistics = self.as_carry(*carry) if len(carry) == 2 else carry
        row = tuple(q.shape[:3])
        beside = {"o": (o, (*row, v.shape[3])), "lse": (lse, row)}
        limits.check_rows(self.name, q, {**beside, "statistics": (statistics, (*row, 2))})
        lse = lse.float().clamp_min(self._empty_lse).unsqueeze(-1)
        return cut.queries(o.float()), cut.queries(lse), cut.queries(statistics)

    def backward(
        self,
        rows: QueryRows,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        carry: Tensor | Triple | None = None,
    ) -> Triple:
        """One block: dq [B, H, S, D], dk [B, G, K, D] and dv [B, G, K, E], fp32; `o` is not read.

        carry: dq, or all three gradients, of other blocks, to which these are added.
        """
        cut = self._prepare(rows.q, k, v, scores)
        row = tuple(rows.q.shape[:3])
        beside = {"do": (rows.do, (*row, v.shape[3])), "lse": (rows.lse, row)}
        before = (carry,) if isinstance(carry, Tensor) else carry or ()
        shapes = (tuple(x.shape) for x in (rows.q, k, v))
        grads = dict(zip(("dq", "dk", "dv"), zip(before, shapes, strict=False), strict=False))
        limits.check_rows(self.name, rows.q, {**beside, "delta": (rows.delta, row), **grads})
        lse = rows.lse.clamp_min(self._empty_lse).unsqueeze(-1)
        inputs = (
            *(cut.queries(x) for x in (rows.do.to(rows.q.dtype), rows.q)),
            *(cut.keys(x) for x in (k, v)),
            *(cut.queries(x) for x in (lse, rows.delta.unsqueeze(-1))),
        )
        launches, found = cut.launches(), _gradients(cut, carry)
        if cut.is_whole(launches):
            found = self._backward_block(inputs, *launches[0], scores, found)
        else:  # launches add to what others began
            missing = (torch.zeros_like(x, dtype=torch.float32) for x in inputs[1 + len(found) : 4])
            found = (*(x.clone() for x in found), *missing)
            for block, bounds in launches:
                places = block.queries, block.key_rows, block.key_rows
                parts = tuple(x[place] for x, place in zip(found, places, strict=True))
                sums = self._backward_block(inputs, block, bounds, scores, parts)
                for x, place, part in zip(found, places, sums, strict=True):
                    x[place] = part
        dq, dk, dv = found
        return dq.reshape(rows.q.shape), cut.sum_keys(dk, k), cut.sum_keys(dv, v)

    def _backward_block(
        self,
        inputs: tuple[Tensor, ...],
        block: Block,
        bounds: tuple[Tensor, ...],
        scores: Scores,
        carry: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """One launch. inputs: do, q, k, v, lse and delta of the whole rectangle."""
        at, keys = block.queries, block.key_rows
        places = (at, at, keys, keys, at, at)
        found: tuple[Tensor, ...] = self._backward_kernel(block)(
            *dense(*(x[place] for x, place in zip(inputs, places, strict=True))),
            block.mask,
            scores.scale,
            softcap=scores.softcap or 0.0,
            carry=dense(*carry),
            bounds=bounds,
        )
        return found

    def row_delta(self, do: Tensor, o: Tensor) -> Tensor:
        """rowsum(do * o) of [B, H, S, E] each: [B, H, S] fp32."""
        return self._support.row_delta(do, o)

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Cut:
        limits.check_block(self.name, q, k, v, scores.mask)
        limits.check_numbers(self.name, scores.scale, scores.softcap)
        limits.check_score_bound(self.name, self.score_bound, q.dtype)
        num_pairs, heads = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        shares = limits.shares(self.name, self.cores, num_pairs, heads)
        loops = self._loops is not None
        return Cut(q, k, v, scores, shares=shares, cores=self.cores, loops=loops)

    def _forward_kernel(self, block: Block) -> Any:
        loops = self._loops if block.mask == "interval" else None
        return loops.forward if loops else self._launch(self._fwd.flash_fwd)

    def _backward_kernel(self, block: Block) -> Any:
        loops = self._loops if block.mask == "interval" else None
        return loops.backward if loops else self._launch(self._bwd.flash_bwd)

    def _launch(self, kernel: Any) -> Any:
        return kernel if self.cores == 1 else kernel[self.cores]


def _gradients(cut: Cut, carry: Tensor | Triple | None) -> tuple[Tensor, ...]:
    """A carry in the kernels' shapes."""
    if carry is None:
        return ()
    if isinstance(carry, Tensor):
        return (cut.queries(carry),)
    return cut.queries(carry[0]), cut.shared(carry[1]), cut.shared(carry[2])
