"""What a kernel case is, and how one is checked: every feature in one dataclass, against fp64.

A case is a block of queries and keys that reaches the kernels in one or more hops, each taking the
result of the one before as its carry, and the gradients on the way back. The allowed error is that
of the same maths in the same dtype on one device (`rounded`), times the factors of budgets.py.

Letters: S query rows, K keys; Hq and Hkv query and key/value heads; D head dim of q and k, E of v.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from budgets import (
    FP32_GRADIENT,
    FP32_OUTPUT,
    MAX_FACTOR,
    RMS_FACTOR,
    error,
    rounding_step,
)
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents, QueryRows, Scores
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.reference import hidden
from nxd_cp.schedule import Bounded

FEW = 4096  # values of a tensor
NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class KernelCase:
    """One block; `str` is the test id.

    mask: "full", "causal", "strict"; "window" (causal, 1/3 of the keys), "band" (both sides),
    "offset" (causal, with more keys than rows or fewer); "documents" (causal within packed ones).
    With more keys than rows, causal and strict blocks are preceded by keys that all rows see.
    hops: pieces in which the keys arrive. gain: factor on q. bounded: the caller promises bounded
    scores. cores: physical cores of a launch.
    """

    generation: str = "gen3"
    mask: str = "full"
    dtype: torch.dtype = torch.float32
    B: int = 1
    Hq: int = 2
    Hkv: int = 1
    S: int = 256
    K: int = 256
    D: int = 64
    E: int = 64
    softcap: float | None = None
    sink: bool = False
    hops: int = 1
    gain: float = 1.0
    bounded: bool = False
    cores: int = 1
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        flags = "".join(
            f"-{f.name}{value:g}" if isinstance(value, float) else f"-{f.name}"
            for f in fields(self)
            if f.name in ("softcap", "sink", "bounded") and (value := getattr(self, f.name))
        )
        return (
            f"{self.generation}-{self.mask}-{dtype}-B{self.B}-H{self.Hq}-G{self.Hkv}-S{self.S}"
            f"-K{self.K}-D{self.D}-E{self.E}-hops{self.hops}-x{self.gain:g}-lnc{self.cores}"
            f"{flags}-{self.seed}"
        )

    @property
    def scale(self) -> float:
        return self.D**-0.5

    @property
    def prefix(self) -> int:
        """Keys before the square of a causal or strict block."""
        return self.K - self.S if self.mask in ("causal", "strict") else 0


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, rounded to its dtype; `seen` is bool [B, 1, S, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    sink: Tensor | None
    seen: Tensor
    pieces: tuple[tuple[slice, BlockMask], ...]


def problem(case: KernelCase) -> Problem:
    """Unit variance, q times the gain; keys cut into the case's hops."""
    make = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(case.B, heads, length, dim, generator=make)

    q, k = normal(case.Hq, case.S, case.D) * case.gain, normal(case.Hkv, case.K, case.D)
    v, do = normal(case.Hkv, case.K, case.E), normal(case.Hq, case.S, case.E)
    sink = torch.randn(case.Hq, generator=make) if case.sink else None
    q, k, v, do = (x.to(case.dtype) for x in (q, k, v, do))
    whole, ids = _mask(case, make)
    seen = ~hidden(whole, case.S, case.K, q.device).expand(case.B, 1, -1, -1)
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    return Problem(q, k, v, do, sink, seen, pieces_of(case, whole, ids))


def _mask(case: KernelCase, make: torch.Generator) -> tuple[Bounded | str, Tensor | None]:
    """The mask of the whole block, and document ids [B, S]."""
    offset = case.K - case.S
    if case.mask == "full":
        return "full", None
    if case.mask in ("causal", "strict", "documents"):
        high = offset - (case.mask == "strict")
        ids = None
        if case.mask == "documents":
            assert case.S == case.K, "documents are those of one sequence"
            starts = torch.rand(case.B, case.S, generator=make) < 4.0 / case.S
            ids = starts.cumsum(-1)
        return Bounded(-case.S, high), ids
    width = max(1, case.K // 3)
    if case.mask == "window":
        return Bounded(offset - width + 1, offset), None
    if case.mask == "band":
        return Bounded(-width, width // 2), None
    assert case.mask == "offset", case.mask
    return Bounded(-case.S - case.K, offset - case.S // 4), None


def pieces_of(
    case: KernelCase, whole: Bounded | str, ids: Tensor | None
) -> tuple[tuple[slice, BlockMask], ...]:
    """The hops: key slices with the mask in each."""
    if case.mask in ("causal", "strict"):
        square = (slice(case.prefix, case.K), case.mask)
        if not case.prefix:
            return (square,)
        before = _cut(case.prefix, max(1, case.hops - 1))
        return (*((keys, "full") for keys in before), square)
    found: list[tuple[slice, BlockMask]] = []
    for keys in _cut(case.K, case.hops):
        mask = whole.within(0, keys.start) if isinstance(whole, Bounded) else whole
        found.append((keys, mask if ids is None else Documents(mask, ids, ids[:, keys])))
    return tuple(found)


def _cut(length: int, count: int) -> list[slice]:
    """At most `count` pieces, unequal where the length does not divide."""
    edges = [length * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


Results = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]


def by_kernels(case: KernelCase, x: Problem, *, before: float = 1.0) -> Results:
    """o, lse, (dq, dk, dv) by the simulated kernels, hop after hop.

    before: what dk and dv carry into every hop but the first; it is taken off again.
    """
    backend = KernelBackend(
        "simulate",
        case.generation,
        cores=case.cores,
        score_bound=32.0 if case.bounded else None,
    )
    carry = None
    if x.sink is not None:
        lse = x.sink.view(1, -1, 1).expand(case.B, case.Hq, case.S)
        carry = torch.zeros(case.B, case.Hq, case.S, case.E), lse
    for keys, mask in x.pieces:
        scores = Scores(mask, case.scale, case.softcap)
        carry = backend.forward(x.q, x.k[:, :, keys], x.v[:, :, keys], scores, carry)
    assert carry is not None, "there is at least one piece"
    o, lse = carry
    rows = QueryRows(x.do, x.q, o, lse, (x.do.float() * o).sum(-1))
    dq, parts = None, []
    for keys, mask in x.pieces:
        k, v = x.k[:, :, keys], x.v[:, :, keys]
        start = None
        if dq is not None:
            start = dq, torch.full(k.shape, before), torch.full(v.shape, before)
        scores = Scores(mask, case.scale, case.softcap)
        dq, dk, dv = backend.backward(rows, k, v, scores, start)
        parts.append((dk, dv) if start is None else (dk - before, dv - before))
    assert dq is not None, "there is at least one piece"
    dk, dv = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return o, lse, (dq, dk, dv)


def exact(case: KernelCase, x: Problem) -> Results:
    """The same in fp64, the gradients by autograd."""
    q, k, v = (t.double().requires_grad_() for t in (x.q, x.k, x.v))
    lse, p = _probabilities(case, x, q, k)
    o = p @ v.repeat_interleave(case.Hq // case.Hkv, dim=1)
    return o.detach(), lse.detach(), torch.autograd.grad(o, (q, k, v), x.do.double())


def rounded(case: KernelCase, x: Problem) -> Results:
    """The same in fp32 with p, ds and the results rounded to the dtype, as one device computes it.

    lse is that of the rounded p, as in the kernels.
    """
    groups = case.Hq // case.Hkv
    q, k, v = (t.float() for t in (x.q, x.k, x.v))
    do = x.do.float()
    k_all, v_all = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    lse, p = _probabilities(case, x, q, k)
    top = p.amax(-1, keepdim=True) if not case.bounded else torch.exp(-lse).unsqueeze(-1)
    top = top.clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
    p_low = (p / top).to(case.dtype).float() * top
    share = p.sum(-1) / p_low.sum(-1)  # both 0 in a row that sees nothing
    o = (p_low @ v_all) * share.nan_to_num(0.0).unsqueeze(-1)
    delta = (do * o).sum(-1, keepdim=True)
    # Flash attention computes scores twice and dp apart from delta: sums of fp32 in another order,
    # which round otherwise. Large scores and small differences show it.
    make = torch.Generator().manual_seed(case.seed)
    s, t = _capped(case, q.flip(-1), k_all.flip(-1))
    s, dp = _rounded_again(s, s.abs(), make), do @ v_all.mT
    dp = _rounded_again(dp, do.abs() @ v_all.abs().mT, make)
    p = (p.sign() * torch.exp(s - lse.unsqueeze(-1))).nan_to_num(0.0)
    ds = (p * (dp - delta) * (1 - t * t)).to(case.dtype).float()
    p_low = p.to(case.dtype).float()
    dq = case.scale * ds @ k_all
    dk, dv = case.scale * ds.mT @ q, p_low.mT @ do
    shape = (case.B, case.Hkv, groups, case.K, -1)
    grads = dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)
    return (
        o.to(case.dtype),
        lse - share.nan_to_num(1.0).log(),
        tuple(g.to(case.dtype) for g in grads),
    )


def _rounded_again(x: Tensor, size: Tensor, make: torch.Generator) -> Tensor:
    """x with an error of one fp32 step of `size`, up or down."""
    step = torch.finfo(torch.float32).eps * size
    return x + step * (2 * torch.randint(2, x.shape, generator=make) - 1)


def _capped(case: KernelCase, q: Tensor, k_all: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with the cap, and its tanh (0 without)."""
    s = q @ k_all.mT * case.scale
    if case.softcap is None:
        return s, torch.zeros(())
    t = torch.tanh(s / case.softcap)
    return case.softcap * t, t


def _probabilities(case: KernelCase, x: Problem, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """lse [B, Hq, S] (-inf where nothing is seen) and p, in the dtype of q."""
    s, _ = _capped(case, q, k.repeat_interleave(case.Hq // case.Hkv, dim=1))
    s = s.masked_fill(~x.seen, -torch.inf)
    if x.sink is None:
        lse = torch.logsumexp(s, -1)
    else:
        column = x.sink.to(s).view(1, -1, 1, 1).expand(*s.shape[:3], 1)
        lse = torch.logsumexp(torch.cat((s, column), -1), -1)
    return lse, torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))


def check(case: KernelCase, given: Problem | None = None) -> None:
    """AssertionError where an output or a gradient is off, or anything is not finite."""
    x = problem(case) if given is None else given
    o, lse, grads = by_kernels(case, x)
    o_true, lse_true, grads_true = exact(case, x)
    o_low, lse_low, grads_low = rounded(case, x)
    seen = lse_true > -torch.inf
    assert torch.equal(lse > -torch.inf, seen), "lse: another row is empty"
    assert not (o * ~seen.unsqueeze(-1)).any(), "o: an empty row is not zero"
    if seen.any():
        _assert_as_good("lse", lse[seen], lse_true[seen], lse_low[seen], FP32_OUTPUT, case.gain)
    found, truth, low = (o, *grads), (o_true, *grads_true), (o_low, *grads_low)
    for name, got, expected, baseline in zip(NAMES, found, truth, low, strict=True):
        assert torch.isfinite(got).all(), f"{name}: not finite"
        absolute = 0.0
        if case.dtype == torch.float32:
            absolute = FP32_OUTPUT if name == "o" else FP32_GRADIENT
        _assert_as_good(name, got, expected, baseline, absolute, case.gain)


def _assert_as_good(
    name: str, got: Tensor, truth: Tensor, baseline: Tensor, absolute: float, gain: float
) -> None:
    """Within a multiple of the one-device error, largest and RMS, and one rounding step.

    absolute: what fp32 may be off in any case, of values up to 1. The RMS of few roundings is no
    steadier than their maximum; with a large gain few rows, those of ties, hold all of the error.
    """
    found, allowed = error(got, truth), error(baseline, truth)
    text = f"{name}: {found}; one device: {allowed}"
    absolute *= max(1.0, float(truth.abs().max()))
    step = max(absolute, rounding_step(truth, baseline.dtype))
    assert found.max_abs <= max(step, MAX_FACTOR * allowed.max_abs), text
    factor = RMS_FACTOR if truth.numel() >= FEW and gain <= 30 else MAX_FACTOR
    rms_step = torch.finfo(baseline.dtype).eps / 4
    allowed_rms = factor * allowed.relative_rms + rms_step
    size = float(truth.square().mean().sqrt())
    assert found.relative_rms * size <= max(absolute, allowed_rms * size), text
