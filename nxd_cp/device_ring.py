"""Ring attention as one device program: backends "nki_ring" and "simulate_ring".

Does: refuse what the ring kernels cannot do, launch them forward and backward, and differentiate.
Does not: schedule or send anything itself; `kernels/ring_fwd.py` and `ring_bwd.py` do all steps.

On a device every rank launches its own program. In the simulator the ranks of a context bring their
tensors to rank 0, which runs all programs together (`simulate_ranks`), and get their results back;
so the ranks may be threads of `CPContext.local` or processes. That traffic is no part of the ring.

Letters: B batch, Hq query heads, Hkv key/value heads, S local rows, D and Dv head dims.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nxd_cp.backends import KERNELS, cores_of, get_support_kernels, ring_arguments
from nxd_cp.backends.device_ops import outputs_like
from nxd_cp.backends.kernel_modules import generation_of, kernel_module
from nxd_cp.backends.ring_arguments import HOST_RING
from nxd_cp.context import CPContext
from nxd_cp.options import Options
from nxd_cp.transport import Call, LocalTransport, RingError
from nxd_cp.transport.agreement import announce_refusal, check_agreement


def attend(
    q: Tensor, k: Tensor, v: Tensor, cp: CPContext | None, options: Options, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, S, Dv] in q's dtype and lse [B, Hq, S] fp32; differentiable.

    given: arguments of `ring_attention` that the ring kernels do not know, by name.
    Raises ValueError for these, and for every other limit of the ring kernels; before any message.
    """
    if cp is None:
        raise ValueError(
            f'backend "{options.backend}": expected a context, got cp=None; a single device needs '
            f'no ring, use backend="{KERNELS[options.backend]}"'
        )
    with cp.refusing("forward"):
        ring = _Ring(cp, options)
        ring.check(q, k, v, given)
    ring.agree(q, k, v)
    o, lse = _Attend.apply(q, k, v, ring)
    return o, lse


class _Ring:
    """The ring of one context."""

    def __init__(self, cp: CPContext, options: Options) -> None:
        self.cp, self.options = cp, options
        self.kernels = KERNELS[options.backend]
        self.support = get_support_kernels(self.kernels)
        self.cores = cores_of(self.kernels)
        self.groups = (tuple(range(cp.size)),)
        self.number = 0  # of the forward call

    def check(self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> None:
        """Raise ValueError for what this rank can see to be impossible."""
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"device ring: expected no {name}, got one; its kernels have full and causal "
                    f"masks only, {HOST_RING}"
                )
        tokens, slots = self.options.seq_len, q.shape[2] * self.cp.size
        if tokens not in (None, slots) or self.options.kv_seq_len not in (None, slots):
            raise ValueError(
                f"device ring: expected no padding, got seq_len={tokens} in {slots} slots; "
                f"{HOST_RING}"
            )
        layout, strategy = self.cp.layout, self.cp.strategy.name
        if strategy not in ("ring", "auto"):
            raise ValueError(
                f'device ring: expected a context with strategy="ring", got "{strategy}"; make it '
                f"so, or {HOST_RING}"
            )
        if self.options.causal and layout != "zigzag":
            raise ValueError(
                f'device ring: expected layout="zigzag" where causal, got "{layout}"; make the '
                f"context with it, or {HOST_RING}"
            )
        if self.kernels == "nki":
            self._check_job()
        self.arguments(q, k, v)

    def agree_on_backward(self) -> None:
        """Raise RankMismatchError on all ranks where one differentiates another forward."""
        self.cp.agree_on("backward", {"of forward call": self.number})

    def agree(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise RankMismatchError on all ranks where one was asked for something else."""
        with self.cp.transport.call("forward") as call:
            self.number = call.number
            if self.cp.agrees:
                named = {key: str(x) for key, x in self.options._asdict().items() if key != "cp"}
                shapes = {name: str(tuple(x.shape)) for name, x in (("q", q), ("k", k), ("v", v))}
                self.cp.agree(call, {**shapes, "dtype": str(q.dtype), **named})

    def _check_job(self) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if isinstance(self.cp.transport, LocalTransport) or world != self.cp.size:
            raise ValueError(
                f'backend "nki_ring": expected a context of all {world} processes of the job, got '
                f"{self.cp}; {HOST_RING}"
            )

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Those of `ring_fwd`, checked."""
        return ring_arguments.forward_arguments(
            q,
            k,
            v,
            groups=self.groups,
            causal=self.options.causal,
            scale=self.options.scale,
            softcap=self.options.softcap,
            generation=generation_of(self.kernels, None),
            cores=self.cores,
        )

    def launch(self, name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
        """This rank's results of a ring kernel."""
        kernel = getattr(kernel_module(self.kernels, None, name), name)
        if self.kernels == "nki":
            return list(kernel[self.cores](*arguments))
        by_tensor = [
            self.cp.transport.all_gather(x.detach())
            if isinstance(x, Tensor)
            else [x] * self.cp.size
            for x in arguments
        ]
        calls = list(zip(*by_tensor, strict=True))
        own = outputs_like(name, [x for x in arguments if isinstance(x, Tensor)])
        found = [x.new_empty((self.cp.size, *x.shape)) for x in own]
        with self.cp.transport.call("simulation") as call:
            if self.cp.rank == 0:
                found = self._simulate(call, kernel, calls)
            check_agreement(call, {"simulated": name})
        return [self.cp.transport.all_gather(x)[0][self.cp.rank] for x in found]

    def _simulate(self, call: Call, kernel: Any, calls: list[tuple[Any, ...]]) -> list[Tensor]:
        """Each result, stacked by rank. The other ranks wait for it, also with check_ranks=False,
        and hear what stops it.
        """
        from nxd_cp.simulators.nki_api import simulate_ranks

        try:
            results = simulate_ranks(kernel, calls, lnc=self.cores)
            return [torch.stack([*parts]) for parts in zip(*results, strict=True)]
        except Exception as error:
            with contextlib.suppress(RingError):  # those that have heard may be gone already
                announce_refusal(call, f"{type(error).__name__}: {error}")
            raise


class _Attend(torch.autograd.Function):
    """The two ring kernels as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        o, lse = ring.launch("ring_fwd", ring.arguments(q, k, v))
        o = o.flatten(2, 3).to(q.dtype)
        lse = lse.flatten(2, 3).squeeze(-1)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.ring.cp.refusing("backward"):
            q, k, v, o, lse = ctx.saved_tensors
            delta = ctx.ring.support.row_delta(do, o)
            arguments = ring_arguments.backward_arguments(
                do, lse, delta, ctx.ring.arguments(q, k, v)
            )
        ctx.ring.agree_on_backward()
        grads = ctx.ring.launch("ring_bwd", arguments)
        return (*(x.flatten(2, 3).to(q.dtype) for x in grads), None)
