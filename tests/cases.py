"""Whole-sequence inputs, their fp64 truth, and the cut into ranks that ring tests share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nxd_cp import reference
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.schedule import Bounded, Mask, token_runs
from nxd_cp.strategies import Strategy

NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem; `str` gives a readable test id."""

    layout: str = "zigzag"
    size: int = 2
    causal: bool = True
    B: int = 1
    S: int = 48
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    strategy: str | Strategy = "ring"

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        kind += f"-window{self.window}" if self.window else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"B{self.B}-S{self.S}-H{self.Hq}-G{self.Hkv}-D{self.D}-{dtype}-{self.layout}"
            f"-cp{self.size}-{kind}-{self.strategy}"
        )

    @property
    def mask(self) -> Mask:
        if self.window is not None:
            return Bounded(1 - self.window, 0)
        return "causal" if self.causal else "full"


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and do of the whole sequence, unit variance, in the case's dtype; always equal."""
    generator = torch.Generator().manual_seed(7)
    heads = (case.Hq, case.Hkv, case.Hkv, case.Hq)
    q, k, v, do = (
        torch.randn(case.B, h, case.S, case.D, generator=generator).to(case.dtype) for h in heads
    )
    return q, k, v, do


@lru_cache(maxsize=64)
def truth(case: Case) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of the whole sequence in fp64, from the rounded inputs."""
    q, k, v, do = (x.double() for x in inputs(case))
    scale = case.D**-0.5
    o, _ = reference.attention(q, k, v, mask=case.mask, scale=scale)
    return (o, *reference.attention_backward(do, q, k, v, mask=case.mask, scale=scale))


def rows(layout: str, size: int, rank: int, seq_len: int) -> Tensor:
    """Global positions that a rank holds."""
    runs = token_runs(layout, size, rank, seq_len)
    return torch.tensor([position for run in runs for position in run])


def cut(x: Tensor, case: Case, rank: int) -> Tensor:
    """A rank's part of [B, H, S, D]."""
    return x[:, :, rows(case.layout, case.size, rank, case.S)]


def join(parts: list[Tensor], case: Case) -> Tensor:
    """The whole sequence from the parts of all ranks."""
    order = torch.cat([rows(case.layout, case.size, rank, case.S) for rank in range(case.size)])
    local = torch.cat(parts, dim=2)
    whole = torch.empty_like(local)
    whole[:, :, order] = local
    return whole


def one_rank(cp: CPContext, case: Case) -> tuple[Tensor, ...]:
    """This rank's o, dq, dk, dv by `ring_attention`."""
    q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = ring_attention(*leaves, cp=cp, causal=case.causal, window=case.window)
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))


def all_ranks_locally(case: Case, **options: object) -> tuple[Tensor, ...]:
    """The whole sequence's o, dq, dk, dv from a ring of threads."""
    group = CPContext.local(case.size, layout=case.layout, strategy=case.strategy, **options)
    return join_all(group.run(lambda cp: one_rank(cp, case)), case)


def join_all(results: list[tuple[Tensor, ...]], case: Case) -> tuple[Tensor, ...]:
    """Join each of o, dq, dk, dv."""
    return tuple(join(list(parts), case) for parts in zip(*results, strict=True))


def one_device(case: Case) -> tuple[Tensor, ...]:
    """o, dq, dk, dv by PyTorch's own flash attention on the whole sequence, in the case's dtype."""
    q, k, v, do = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seen = None
    if case.window is not None:
        seen = ~reference.hidden(case.mask, case.S, case.S, q.device)
    o = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=seen, is_causal=case.causal and seen is None, enable_gqa=True
    )
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))
