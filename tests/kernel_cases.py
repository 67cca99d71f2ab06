"""What a kernel case is, and how one is checked: every feature in one dataclass, against fp64.

A case is a block of queries and keys that reaches the kernels in one or more hops, each taking the
result of the one before as its carry, and the gradients on the way back.

Note [Budget]
    An error may be twice that of the same maths in the same dtype. That is measured, not chosen:
    `OneDevice` computes attention and its gradients as a device does, with p and ds rounded to the
    dtype and everything else in fp32. How a sum in fp32 rounds depends on the order of its terms,
    and with large scores few ties hold all of an error; so several results are drawn. Each addition
    rounds the sum so far, so the error of n terms added one after the other is about normal. Its
    RMS is ROUNDING times the root of the sums' squares: n sum**2 / 3 of sums that grow steadily,
    and (pi * sum of the terms' sizes)**2 / 24 of those that wander, their terms being products of
    normal numbers (tests/test_kernel_budget.py measures it).
    How p rounds to the dtype depends on the row's shift, which is that of a hop or of a tile: in
    each result it is another one, up to e above the maximum.
    What exp is taken of is rounded as it is scaled, and so is the shift, once per hop; p has been
    rounded to the dtype before that.
    Sums that are taken hop by hop are also rounded once per hop or more: each result has as many
    roundings of L, of o and of dq as the hops make, every one up or down, and dk and dv have
    passed through what they carry. The logarithm of L is taken once, whatever the hops.

Letters: S query rows, K keys; Hq and Hkv query and key/value heads; D head dim of q and k, E of v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from budgets import RMS_FACTOR, error
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents, QueryRows, Scores
from nxd_cp.backends.kernel_limits import MAX_SCORE_BOUND
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.reference import hidden
from nxd_cp.schedule import Bounded

LEAST_SAMPLES, MOST_SAMPLES, ENOUGH_SCORES = 8, 64, 2**17  # see `OneDevice.samples`
EMPTY = -1e30
FP32_STEP = torch.finfo(torch.float32).eps / 2
# RMS of a rounding to fp32, relative: uniform within half a step, mantissas spread as logarithms.
ROUNDING = FP32_STEP / (8 * math.log(2)) ** 0.5
# What happens at each hop, one rounding after the other. To a row of o (kernels/finish.py): a
# weight's difference, exp, times L or l, plus the other, reciprocal, product, times the sum, plus
# the carry; to L: the first four of these; to dq (flash_bwd.py): times scale, plus dq.
O_ROUNDINGS, SUM_ROUNDINGS, DQ_ROUNDINGS = 8, 4, 2
LSE_ROUNDINGS = 2  # once: the scaled maximum, plus a logarithm
CARRIED = 1.0  # what dk and dv carry into every hop but the first
NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class KernelCase:
    """One block; `str` is the test id.

    mask: "full", "causal", "strict"; "window" (causal, 1/3 of the keys), "band" (both sides),
    "offset" (causal, with more keys than rows or fewer); "documents" (causal within packed ones).
    With more keys than rows, causal and strict blocks are preceded by keys that all rows see.
    hops: pieces in which the keys arrive. gain: factor on q. bounded: the caller promises bounded
    scores. cores: physical cores of a launch. loops: masks of intervals are skipped at run time.
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
    loops: bool = False
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        flags = "".join(
            f"-{f.name}{value:g}" if isinstance(value, float) else f"-{f.name}"
            for f in fields(self)
            if f.name in ("softcap", "sink", "bounded", "loops")
            and (value := getattr(self, f.name))
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


Pair = tuple[Tensor, Tensor]
Results = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]


def by_kernels(case: KernelCase, x: Problem, *, before: float = CARRIED) -> Results:
    """o, lse, (dq, dk, dv) by the simulated kernels, hop after hop.

    before: what dk and dv carry into every hop but the first; it is taken off again.
    """
    backend = KernelBackend(
        "simulate",
        case.generation,
        cores=case.cores,
        score_bound=MAX_SCORE_BOUND if case.bounded else None,
        device_loops=case.loops,
    )
    carry = None
    if x.sink is not None:
        lse = x.sink.view(1, -1, 1).expand(case.B, case.Hq, case.S)
        carry = torch.zeros(case.B, case.Hq, case.S, case.E), lse
    for keys, mask in x.pieces:
        scores = Scores(mask, case.scale, case.softcap)
        carry = backend.forward(x.q, x.k[:, :, keys], x.v[:, :, keys], scores, carry)
    assert carry is not None, "there is at least one piece"
    o, lse, *_ = carry
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
    s, _ = _capped(case, q @ _expanded(case, k).mT * case.scale)
    s = s.masked_fill(~x.seen, -torch.inf)
    lse = torch.logsumexp(s, -1)
    if x.sink is not None:
        lse = torch.logaddexp(lse, x.sink.double().view(1, -1, 1))
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    o = p @ _expanded(case, v)
    return o.detach(), lse.detach(), torch.autograd.grad(o, (q, k, v), x.do.double())


def _expanded(case: KernelCase, kv: Tensor) -> Tensor:
    """[B, Hkv, K, ...] repeated for the query heads of each group."""
    return kv.repeat_interleave(case.Hq // case.Hkv, dim=1)


def _capped(case: KernelCase, s: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores with the cap, and its tanh (0 without)."""
    if case.softcap is None:
        return s, torch.zeros(())
    t = torch.tanh(s / case.softcap)
    return case.softcap * t, t


class OneDevice:
    """The same maths on one device: fp32, with p and ds rounded to the dtype. See Note [Budget].

    `sample` gives one of the results that it may give: every call rounds sums another way.
    """

    def __init__(self, case: KernelCase, x: Problem) -> None:
        self.case, self.x = case, x
        self.make = torch.Generator().manual_seed(case.seed)
        self.q, self.do = x.q.float(), x.do.float()
        self.k, self.v = (_expanded(case, t.float()) for t in (x.k, x.v))
        self.s, self.s_size = (t * case.scale for t in _product(self.q, self.k))
        self.dp, self.dp_size = _product(self.do, self.v)

    def samples(self) -> list[Results]:
        """So many that a small problem, too, shows its larger errors: few sums seldom do."""
        enough = ENOUGH_SCORES // self.s.numel()
        count = min(max(LEAST_SAMPLES, enough), MOST_SAMPLES)
        return [self.sample() for _ in range(count)]

    def sample(self) -> Results:
        """o, lse, (dq, dk, dv), fp32."""
        case = self.case
        o, lse = self._forward()
        s, t = self._scores()
        p = torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
        p = p.masked_fill(~self.x.seen, 0.0).to(case.dtype).float()
        delta = (self.do * o).sum(-1, keepdim=True)
        ds = p * (1 - t * t) * (self._summed(self.dp, self.dp_size, case.E) - delta)
        ds = ds.to(case.dtype).float()
        dk, dv = case.scale * ds.mT @ self.q, p.mT @ self.do
        shape = case.B, case.Hkv, case.Hq // case.Hkv, case.K, -1
        dq = self._rounded_rows(case.scale * ds @ self.k, DQ_ROUNDINGS * len(self.x.pieces))
        dk, dv = (self._carried(t.reshape(shape).sum(2)) for t in (dk, dv))
        return o, lse, (dq, dk, dv)

    def _carried(self, grad: Tensor) -> Tensor:
        """dk or dv, those of later hops added to what they carry, which is taken off again."""
        first = self.x.pieces[0][0].stop
        later = (grad[:, :, first:] + CARRIED) - CARRIED
        return torch.cat((grad[:, :, :first], later), dim=2)

    def _rounded_rows(self, t: Tensor, roundings: int) -> Tensor:
        """Each row after so many roundings, one after the other."""
        shape = roundings, *t.shape[:-1], 1
        up_or_down = 2 * torch.rand(shape, generator=self.make, dtype=torch.float64) - 1
        return (t.double() * (1 + FP32_STEP * up_or_down.sum(0))).float()

    def _forward(self) -> Pair:
        """o and lse, with the roundings of hops, each by the size of what is rounded."""
        case, x = self.case, self.x
        s = self._scores()[0].masked_fill(~x.seen, -torch.inf)
        c = s.amax(-1, keepdim=True)
        late = torch.rand(c.shape, generator=self.make)
        c = torch.zeros_like(c) if case.bounded else (c + late).clamp_min(EMPTY)
        below = (s - c).masked_fill(~x.seen, 0.0)
        p = torch.exp(below + self._rounded(below)).masked_fill(~x.seen, 0.0)
        p = p.to(case.dtype).float()
        size = c.masked_fill(c <= EMPTY, 0.0)
        for keys, _ in x.pieces:
            p[..., keys] *= torch.exp(self._rounded(size))
        sink = torch.tensor(-torch.inf) if x.sink is None else x.sink.view(1, -1, 1, 1)
        top = torch.maximum(c, sink)
        new = torch.exp(c - top)
        total = new * p.sum(-1, keepdim=True) + torch.exp(sink - top)
        empty = total == 0
        o = (new * (p @ self.v) / total).masked_fill(empty, 0.0)
        hops = len(x.pieces)
        total = self._rounded_rows(total, SUM_ROUNDINGS * hops)
        lse = self._rounded_rows(top + total.log(), LSE_ROUNDINGS).masked_fill(empty, -torch.inf)
        return self._rounded_rows(o, O_ROUNDINGS * hops), lse.squeeze(-1)

    def _scores(self) -> Pair:
        """Scores with the cap and its tanh, which is rounded up or down."""
        s, t = _capped(self.case, self._summed(self.s, self.s_size, self.case.D))
        if self.case.softcap is None:
            return s, t
        t = (t + self._rounded(t)).clamp(-1, 1)
        return self.case.softcap * t, t

    def _summed(self, exact: Tensor, size: Tensor, num_terms: int) -> Tensor:
        """A sum in fp32, one term after the other; size: that of the terms' absolute values."""
        return (exact + summing_noise(exact, size, num_terms, self.make)).float()

    def _rounded(self, size: Tensor) -> Tensor:
        """The rounding of one number of this size, up or down."""
        return FP32_STEP * size * (2 * torch.rand(size.shape, generator=self.make) - 1)


def summing_noise(exact: Tensor, size: Tensor, num_terms: int, make: torch.Generator) -> Tensor:
    """The error of sums in fp32, whose terms' sizes add up to `size`: see Note [Budget]."""
    grows, wanders = num_terms * exact.square() / 3, math.pi**2 / 24 * size.square()
    return ROUNDING * (grows + wanders).sqrt() * torch.randn(size.shape, generator=make)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b^T in fp64, and the same of absolute values."""
    return a.double() @ b.double().mT, a.abs() @ b.abs().mT


def check(case: KernelCase, given: Problem | None = None) -> None:
    """AssertionError where an output or a gradient is off, or anything is not finite."""
    x = problem(case) if given is None else given
    o, lse, grads = by_kernels(case, x)
    o_true, lse_true, grads_true = exact(case, x)
    device = OneDevice(case, x)
    samples = device.samples()
    seen = lse_true > -torch.inf
    assert torch.equal(lse > -torch.inf, seen), "lse: another row is empty"
    assert not (o * ~seen.unsqueeze(-1)).any(), "o: an empty row is not zero"
    if seen.any():
        assert_as_good("lse", lse[seen], lse_true[seen], [s[1][seen] for s in samples])
    found, truth = (o, *grads), (o_true, *grads_true)
    baselines = zip(*((s[0], *s[2]) for s in samples), strict=True)
    for name, got, expected, same in zip(NAMES, found, truth, baselines, strict=True):
        assert torch.isfinite(got).all(), f"{name}: not finite"
        assert_as_good(name, got, expected, list(same))


def assert_as_good(name: str, got: Tensor, truth: Tensor, same: list[Tensor]) -> None:
    """At most twice the error of the same maths, largest and RMS.

    same: what the same maths gives on one device, rounded in several ways.
    """
    found, errors = error(got, truth), [error(baseline, truth) for baseline in same]
    largest = max(e.max_abs for e in errors)
    text = f"{name}: {found}; one device: max {largest:.3e}"
    assert found.max_abs <= RMS_FACTOR * largest, text
    rms = max(e.relative_rms for e in errors)
    assert found.relative_rms <= RMS_FACTOR * rms, f"{name}: {found}; one device: {rms:.3e}"
