"""Whole-sequence inputs, their fp64 truth, and the cut into ranks that ring tests share.

A sequence that the ranks do not divide is padded with NaN, so that whoever reads padding shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close
from torch import Tensor

from nxd_cp import reference
from nxd_cp.attention import ring_attention
from nxd_cp.context import CPContext
from nxd_cp.schedule import Bounded, padded_len, token_runs
from nxd_cp.strategies import Strategy

NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One problem; `str` gives a readable test id.

    S, Skv: tokens of the whole sequence, any number; Skv None is S. Dv None is D. lengths: packed
    documents, given as cu_seqlens, or as segment_ids where by_id.
    """

    layout: str = "zigzag"
    size: int = 2
    causal: bool = True
    B: int = 1
    S: int = 48
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    dtype: torch.dtype = torch.float32
    window: int | tuple[int | None, int | None] | None = None
    Skv: int | None = None
    Dv: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lengths: tuple[int, ...] | None = None
    by_id: bool = False
    strategy: str | Strategy = "ring"

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        kind += f"-window{self.window}" if self.window else ""
        kind += f"-cap{self.softcap}" if self.softcap else ""
        kind += "-sinks" if self.sinks else ""
        kind += f"-{len(self.lengths)}docs{'-by-id' if self.by_id else ''}" if self.lengths else ""
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = f"S{self.S}" + (f"x{self.Skv}" if self.Skv else "")
        dims = f"D{self.D}" + (f"x{self.Dv}" if self.Dv else "")
        return (
            f"B{self.B}-{lengths}-H{self.Hq}-G{self.Hkv}-{dims}-{dtype}-{self.layout}"
            f"-cp{self.size}-{kind}-{self.strategy}"
        )

    @property
    def num_keys(self) -> int:
        """Keys of the whole sequence."""
        return self.Skv or self.S

    @property
    def names(self) -> tuple[str, ...]:
        """What `truth` and the ring return."""
        return (*NAMES, "dsinks") if self.sinks else NAMES

    def hidden(self) -> Tensor:
        """bool [S, Skv], True where a key is not seen; the last query sees the last key."""
        left, right = (self.window - 1, 0) if isinstance(self.window, int) else (None, None)
        if isinstance(self.window, tuple):
            left, right = self.window
        right = 0 if self.causal else right
        shift = self.num_keys - self.S
        far = self.S + self.num_keys
        band = Bounded(
            shift - (far if left is None else left), shift + (far if right is None else right)
        )
        unseen = reference.hidden(band, self.S, self.num_keys, torch.device("cpu"))
        if self.lengths is not None:
            ids = self.ids()
            unseen = unseen | (ids[:, None] != ids)
        return unseen

    def ids(self) -> Tensor:
        """The document of each position."""
        assert self.lengths is not None
        assert sum(self.lengths) == self.S, "documents fill the sequence"
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    def cu_seqlens(self) -> Tensor:
        """The documents as cumulative lengths."""
        assert self.lengths is not None
        return torch.tensor([0, *self.lengths]).cumsum(0).int()


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and do of the whole sequence, unit variance, in the case's dtype; always equal."""
    generator = torch.Generator().manual_seed(7)
    Dv = case.Dv or case.D
    shapes = (
        (case.Hq, case.S, case.D),
        (case.Hkv, case.num_keys, case.D),
        (case.Hkv, case.num_keys, Dv),
        (case.Hq, case.S, Dv),
    )
    q, k, v, do = (
        torch.randn(case.B, *shape, generator=generator).to(case.dtype) for shape in shapes
    )
    return q, k, v, do


def sinks_of(case: Case) -> Tensor | None:
    """Sinks of unit variance, fp32."""
    if not case.sinks:
        return None
    return torch.randn(case.Hq, generator=torch.Generator().manual_seed(8))


@lru_cache(maxsize=64)
def truth(case: Case) -> tuple[Tensor, ...]:
    """o, dq, dk, dv (and dsinks) of the whole sequence in fp64, from the rounded inputs."""
    q, k, v, do = (x.double() for x in inputs(case))
    sinks = sinks_of(case)
    options: dict[str, Any] = {
        "mask": case.hidden(),
        "scale": case.D**-0.5,
        "softcap": case.softcap,
        "sinks": None if sinks is None else sinks.double(),
    }
    o, _ = reference.attention(q, k, v, **options)
    return (o, *reference.attention_backward(do, q, k, v, **options))


def check_fp32(case: Case, found: tuple[Tensor, ...]) -> None:
    """Outputs and gradients are those of fp64, within the fixed bounds of fp32."""
    for name, x, y in zip(case.names, found, truth(case), strict=True):
        bound = FP32_OUTPUT if name == "o" else FP32_GRADIENT
        assert_close(f"{case} {name}", x, y, bound)


def rows(layout: str, size: int, rank: int, seq_len: int) -> Tensor:
    """Global positions that a rank holds; slots that hold no token have positions from S on."""
    runs = token_runs(layout, size, rank, padded_len(layout, size, seq_len))
    return torch.tensor([position for run in runs for position in run])


def cut(x: Tensor, case: Case, rank: int) -> Tensor:
    """A rank's part of [B, H, S, D], NaN where it is padding."""
    seq_len = x.shape[2]
    mine = rows(case.layout, case.size, rank, seq_len)
    padding = x.new_full((*x.shape[:2], int(mine.max()) + 1, x.shape[3]), torch.nan)
    padding[:, :, :seq_len] = x[:, :, : padding.shape[2]]
    return padding[:, :, mine]


def join(parts: list[Tensor], case: Case, seq_len: int | None = None) -> Tensor:
    """The whole sequence from the parts of all ranks; padding must be zero."""
    seq_len = case.S if seq_len is None else seq_len
    order = torch.cat([rows(case.layout, case.size, rank, seq_len) for rank in range(case.size)])
    local = torch.cat(parts, dim=2)
    whole = torch.empty_like(local)
    whole[:, :, order] = local
    padding = whole[:, :, seq_len:]
    assert torch.equal(padding, torch.zeros_like(padding)), "padding comes out as zeros"
    return whole[:, :, :seq_len]


def one_rank(cp: CPContext, case: Case, **options: Any) -> tuple[Tensor, ...]:
    """This rank's o, dq, dk, dv (and its part of dsinks) by `ring_attention`."""
    q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
    sinks = sinks_of(case)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    if case.lengths is not None and case.by_id:
        mine = rows(case.layout, case.size, cp.rank, case.S)
        options["segment_ids"] = case.ids()[mine.clamp(max=case.S - 1)].expand(case.B, -1)
    elif case.lengths is not None:
        options["cu_seqlens"] = case.cu_seqlens()
    o = ring_attention(
        q,
        k,
        v,
        cp=cp,
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        sinks=sinks,
        seq_len=case.S,
        kv_seq_len=case.num_keys,
        **options,
    )
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))


def all_ranks_locally(case: Case, **options: Any) -> tuple[Tensor, ...]:
    """The whole sequence's o, dq, dk, dv (and dsinks) from a ring of threads."""
    group = CPContext.local(case.size, layout=case.layout, strategy=case.strategy, **options)
    return join_all(group.run(lambda cp: one_rank(cp, case)), case)


def join_all(results: list[tuple[Tensor, ...]], case: Case) -> tuple[Tensor, ...]:
    """Join each of o, dq, dk, dv; add the ranks' dsinks."""
    o, dq, dk, dv, *dsinks = ([*parts] for parts in zip(*results, strict=True))
    by_query = (join(parts, case) for parts in (o, dq))
    by_key = (join(parts, case, case.num_keys) for parts in (dk, dv))
    return (*by_query, *by_key, *(torch.stack(parts).sum(0) for parts in dsinks))


def one_device(case: Case) -> tuple[Tensor, ...]:
    """o, dq, dk, dv by PyTorch's own attention on the whole sequence, in the case's dtype."""
    assert not case.sinks, "PyTorch has no sinks"
    assert case.softcap is None, "nor soft-capping"
    q, k, v, do = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    unseen = case.hidden()
    is_causal = torch.equal(unseen, torch.ones_like(unseen).triu(1))
    o = torch.nn.functional.scaled_dot_product_attention(
        *leaves,
        attn_mask=None if is_causal or not unseen.any() else ~unseen,
        is_causal=is_causal,
        enable_gqa=True,
    )
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))
