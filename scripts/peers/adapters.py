"""Other libraries' ring attention behind one interface, for `bench_peers.py`.

Does: cut a whole sequence as each library wants it, and run forward, or forward and backward, on
one rank's part. Does not: time, or repair anything: what a library computes is what is shown.

    ours               nxd_cp.ring_attention, zigzag, on torch.distributed
    torch-alltoall     torch.distributed.tensor.experimental's templated ring attention (private
    torch-allgather    API), load-balanced, over PyTorch's CPU flash attention, both rotations
    lucidrains         ring_attention_pytorch.ring_flash_attn, contiguous, its default bucket size

Letters: B batch, H query heads, G key/value heads, S tokens, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nxd_cp import CPContext, ring_attention, shard
from nxd_cp.schedule import token_runs
from nxd_cp.strategies import Strategy

Tensors = list[Tensor]


class Peer(Protocol):
    """One implementation on one rank. Tensors outside are [B, heads, S, D]."""

    def cut(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """This rank's part of a whole tensor."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o, without gradients."""
        ...

    def both(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Tensors:
        """o, dq, dk, dv."""
        ...


def differentiate(attention: Callable[..., Tensor], qkv: Tensors, do: Tensor) -> Tensors:
    """o and the gradients of q, k and v by autograd."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    o = attention(*leaves)
    o.backward(do)
    return [o.detach(), *(x.grad for x in leaves)]


class Ours:
    """nxd_cp; window: keys that each query sees. strategy: as in `CPContext`."""

    def __init__(self, window: int | None = None, strategy: str | Strategy = "ring") -> None:
        self.cp = CPContext.from_group(dist.group.WORLD, strategy=strategy)
        self.window = window

    def cut(self, x: Tensor, num_kv_heads: int) -> Tensor:
        return shard(x, self.cp, dim=2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self._attend(q, k, v)

    def both(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Tensors:
        return differentiate(self._attend, [q, k, v], do)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, cp=self.cp, window=self.window)


class TorchRing:
    """PyTorch's templated ring; forward and backward are called as its own dispatcher does."""

    def __init__(self, rotation: str) -> None:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        self._ring, self._rotation = _attention, rotation
        self._group = dist.group.WORLD

    def cut(self, x: Tensor, num_kv_heads: int) -> Tensor:
        size = dist.get_world_size()
        runs = token_runs("zigzag", size, dist.get_rank(), x.shape[2])
        return torch.cat([x[:, :, run.start : run.stop] for run in runs], dim=2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self._forward(q, k, v)[0]

    def both(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Tensors:
        with torch.no_grad():
            o, lse, *_ = self._forward(q, k, v)
            grads = self._ring._templated_ring_attention_backward(
                self._group,
                2,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
                do,
                "grad_out",
                q,
                k,
                v,
                o,
                lse,
                is_causal=True,
                dropout_p=0.0,
                scale=q.shape[-1] ** -0.5,
            )
        return [o, *grads[:3]]

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        self._ring._cp_options.enable_load_balance = True
        self._ring.set_rotate_method(self._rotation)
        return self._ring._templated_ring_attention(
            self._group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            q,
            k,
            v,
            is_causal=True,
            dropout_p=0.0,
            scale=q.shape[-1] ** -0.5,
        )


class Lucidrains:
    """ring_attention_pytorch; [B, S, heads, D], and query head h reads key/value head h % G."""

    def cut(self, x: Tensor, num_kv_heads: int) -> Tensor:
        if x.shape[1] != num_kv_heads:
            x = x.unflatten(1, (num_kv_heads, -1)).transpose(1, 2).flatten(1, 2)
        return x.chunk(dist.get_world_size(), dim=2)[dist.get_rank()].contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self._attend(q, k, v)

    def both(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Tensors:
        return differentiate(self._attend, [q, k, v], do)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        o = ring_flash_attn(
            q, k, v, causal=True, ring_reduce_col=True, ring_size=dist.get_world_size()
        )
        return o.transpose(1, 2)


PEERS: dict[str, Callable[[], Peer]] = {
    "ours": Ours,
    "torch-alltoall": lambda: TorchRing("alltoall"),
    "torch-allgather": lambda: TorchRing("allgather"),
    "lucidrains": Lucidrains,
}


def installed() -> list[str]:
    """The peers that can be imported here."""
    has = importlib.util.find_spec("ring_attention_pytorch") is not None
    return [name for name in PEERS if name != "lucidrains" or has]
