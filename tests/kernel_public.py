"""Cases of public test suites for the kernels: one rank's share, at their shapes, lengths cut.

Each case is held to two things: the tolerance that its suite states (against fp64 here, where the
suite compares two runs in low precision), and ours, `kernel_cases.check`, of inputs of mean zero. A
rank's share is its queries against the keys of all ranks, hop by hop as the layout has it; the rank
that sees the most.

Sources, shapes and tolerances as read there:
    aws-neuron/nki-library e9ef98f test/integration/nkilib/experimental/attention/
        test_ring_attention_fwd.py: o and lse, atol 1e-3, rtol 1e-2 (the default of
        test/utils/unit_test_collective_framework.py); test_ring_attention_bwd.py (092a49d): dq, dk,
        dv of fp16, both 1e-2. rtol is of the largest value (test/integration/nkilib/utils/
        comparators.py at d2ad3a5). No tolerance for the other direction.
    NVIDIA/TransformerEngine 015d225 tests/pytorch/attention/run_attention_with_cp.py: outputs and
        gradients, atol = rtol = 2.5e-2 (bf16, MHA), 3.5e-2 (bf16, fewer key heads), 5e-3 (fp16).
        Shapes: test_attention_with_cp.py at 00d14cd.
    zhuzilin/ring-flash-attention 22f0e1d test/: prints differences, states no tolerance.
    pytorch/pytorch 8e4fb1f test/distributed/tensor/test_attention.py: outputs and gradients of
        uniform inputs and do = 1; fp32 atol 2e-6, rtol 1e-5; bf16 8e-3 and 1e-3 times the ranks.

Letters as in kernel_cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_cases import NAMES, KernelCase, Problem, by_kernels, check, exact, pieces_of, problem
from torch import Tensor

from nxd_cp.reference import hidden
from nxd_cp.schedule import Bounded

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
GENERATIONS = ("gen2", "gen3", "gen4")


@dataclass(frozen=True)
class Tolerance:
    """|found - truth| <= atol + rtol |truth|, or rtol times the largest |truth|."""

    rtol: float
    atol: float
    of_largest: bool = False

    def excess(self, found: Tensor, truth: Tensor) -> float:
        """By how much the worst element is off; at most 0 where all is well."""
        size = truth.abs().max() if self.of_largest else truth.abs()
        return float(((found - truth).abs() - self.atol - self.rtol * size).max())


@dataclass(frozen=True)
class PublicCase:
    """theirs: the shape there. output (o and lse), gradients: what the suite states, or nothing.

    window: keys seen before and after a row's own place. ends: where documents begin and the last
    one ends. striped: the rank of a striped layout whose hops these are. uniform: inputs from 0 to
    1 and do = 1, else standard normal.
    """

    source: str
    theirs: str
    case: KernelCase
    output: Tolerance | None = None
    gradients: Tolerance | None = None
    window: tuple[int, int] | None = None
    ends: tuple[int, ...] = ()
    striped: int | None = None
    uniform: bool = False

    def __str__(self) -> str:
        return f"{self.source}: {self.theirs} as {self.case}"

    def problem(self) -> Problem:
        """Inputs and hops."""
        case, x = self.case, problem(self.case)
        if self.uniform:
            make = torch.Generator().manual_seed(case.seed)
            q, k, v = (torch.rand(t.shape, generator=make).to(t.dtype) for t in (x.q, x.k, x.v))
            x = replace(x, q=q, k=k, v=v, do=torch.ones_like(x.do))
        if self.window is not None:
            offset = case.K - case.S
            whole = Bounded(offset - self.window[0], offset + self.window[1])
            seen = ~hidden(whole, case.S, case.K, x.q.device).expand_as(x.seen)
            x = replace(x, seen=seen, pieces=pieces_of(case, whole, None))
        if self.ends:
            lengths = torch.tensor(self.ends).diff()
            ids = torch.arange(len(lengths)).repeat_interleave(lengths).expand(case.B, -1)
            same = ids[:, None, :, None] == ids[:, None, None, :]
            causal = Bounded(-case.S, 0)
            x = replace(x, seen=same.tril(), pieces=pieces_of(case, causal, ids))
        if self.striped is not None:
            masks = ["causal" if hop <= self.striped else "strict" for hop in range(case.hops)]
            at = [slice(hop * case.S, (hop + 1) * case.S) for hop in range(case.hops)]
            seen = [~hidden(mask, case.S, case.S, x.q.device) for mask in masks]
            seen_by_row = torch.cat(seen, dim=1).expand_as(x.seen)
            x = replace(x, seen=seen_by_row, pieces=tuple(zip(at, masks, strict=True)))
        return x

    def check(self) -> None:
        """AssertionError where the suite's tolerance or ours does not hold."""
        x = self.problem()
        # Ours is for inputs of mean zero. With do = 1 and positive values do v^T and delta are
        # large and nearly equal, and their roundings, not those of dq, are what shows in dq.
        check(self.case, problem(self.case) if self.uniform else x)
        o, lse, grads = by_kernels(self.case, x)
        o_true, lse_true, true = exact(self.case, x)
        if self.output is not None:
            seen = lse_true > -torch.inf
            assert self.output.excess(o, o_true) <= 0, f"o: not within {self.output}"
            assert self.output.excess(lse[seen], lse_true[seen]) <= 0, f"lse: {self.output}"
        if self.gradients is not None:
            for name, found, expected in zip(NAMES[1:], grads, true, strict=True):
                excess = self.gradients.excess(found, expected)
                assert excess <= 0, f"{name}: {excess} above {self.gradients}"


def _nki_library() -> list[dict[str, Any]]:
    """Lengths / 8 (their 10240, 16384 and 32768 / 32); (batch, heads, rows of a rank, head dim)."""
    fwd = {"source": "nki-library fwd", "output": Tolerance(1e-2, 1e-3, True), "dtype": BF16}
    bwd = {"source": "nki-library bwd", "gradients": Tolerance(1e-2, 1e-2, True), "dtype": HALF}
    full, last = {"mask": "full"}, {"mask": "causal"}
    stripe = {"mask": "strict", "striped": 0}
    cuts = (0, 1024, 4096, 6144, 10240, 12288, 15360, 16384)
    packed = {"mask": "documents", "K": 1024, "ends": tuple(x // 16 for x in cuts)}
    masks = (full, last, stripe)
    return [
        *(fwd | m | _ring(2, 512, B=2, H=2, theirs="(2, 2, 4096, 128)") for m in masks),
        fwd | stripe | _ring(4, 64, H=2, theirs="(1, 2, 512, 128)"),
        fwd | full | _ring(2, 512, B=3, H=1, theirs="(3, 1, 4096, 128)"),
        fwd | last | _ring(2, 512, H=3, theirs="(1, 3, 4096, 128)"),
        *(fwd | m | _ring(4, 320, H=1, theirs="(1, 1, 10240, 128)") for m in masks),
        fwd | packed | _ring(4, 1024, H=2, theirs=f"(1, 2, 4096, 128), documents {cuts}"),
        *(fwd | m | _ring(2, 520, H=1, theirs="(1, 1, 4160, 128)") for m in masks),
        fwd | full | _ring(2, 72, H=1, cores=2, B=2, theirs="(1, 1, 576, 128)"),
        *(fwd | last | _ring(4, s // 8, H=2, theirs=f"(1, 2, {s}, 128)") for s in (512, 256)),
        fwd | last | _ring(4, 64, H=2, D=16, theirs="(1, 2, 512, 16)"),
        fwd | last | _ring(2, 288, H=6, theirs="(1, 6, 2304, 128) in four groups"),
        *(bwd | m | _ring(4, 256, H=2, theirs="(1, 2, 2048, 128)") for m in masks),
        bwd | full | _ring(4, 128, B=3, H=3, theirs="(3, 3, 1024, 128)"),
        bwd | last | _ring(4, 256, B=3, H=1, theirs="(3, 1, 2048, 128)"),
        *(bwd | m | _ring(4, 256, H=2, theirs="(1, 2, 8192, 128)") for m in (full, stripe)),
        bwd | packed | _ring(4, 1024, H=2, theirs=f"(1, 2, 4096, 128), documents {cuts}"),
    ]


def _transformer_engine() -> list[dict[str, Any]]:
    """Two ranks; batch 2, 4096 tokens / 16, head dim 128 (MLA 192 and 128; 12 of its 128 heads)."""

    def one(tolerance: float, heads: int, keys: int, dtype: torch.dtype = BF16, **more: Any) -> Any:
        both = Tolerance(tolerance, tolerance)
        shape = {"B": 2, "S": 128, "K": 256, "hops": 2, "D": 128, "mask": "causal", "dtype": dtype}
        name = f"(2, 4096, {heads}, 128), {keys} key heads"
        fixed = {"source": "TransformerEngine", "output": both, "gradients": both, "theirs": name}
        return fixed | shape | {"Hq": heads, "Hkv": keys} | more

    mla = {"D": 192, "E": 128, "theirs": "(2, 4096, 12, 192) and 128"}
    causal, both_sides = {"mask": "window", "window": (32, 0)}, {"mask": "band", "window": (32, 32)}
    return [
        one(2.5e-2, 12, 12),
        one(2.5e-2, 12, 12, mask="full"),
        one(2.5e-2, 12, 12, **causal),
        one(2.5e-2, 12, 12, **both_sides),
        one(3.5e-2, 32, 4),
        one(3.5e-2, 12, 2, mask="full"),
        one(2.5e-2, 32, 32, mask="window", window=(8, 0)),
        one(3.5e-2, 12, 2, **both_sides),
        one(5e-3, 32, 4, dtype=HALF),
        one(2.5e-2, 12, 12, **mla),
        one(2.5e-2, 12, 12, **mla, mask="full"),
        one(2.5e-2, 12, 12, **mla, **causal),
        one(2.5e-2, 12, 12, **mla, **both_sides),
    ]


def _ring_flash_attention() -> list[dict[str, Any]]:
    """5 heads of 128, bf16; tokens / 8."""
    fixed = {"source": "ring-flash-attention", "dtype": BF16}
    found = [
        fixed | {"mask": "causal"} | _ring(2, s // 16, H=5, theirs=f"{s} tokens")
        for s in (3816, 3824)
    ]
    for ends in ((0, 120, 1248, 4232), (0, 128, 1248, 4240), (0, 7, 14, 16)):
        cut = ends if ends[-1] == 16 else tuple(x // 8 for x in ends)
        shape = {"mask": "documents", "K": cut[-1], "ends": cut}
        found.append(fixed | shape | _ring(2, cut[-1], H=5, theirs=f"documents {ends}"))
    return found


def _pytorch() -> list[dict[str, Any]]:
    """Batch 8 (2 here), 8 heads of 32, 1024 tokens per rank / 8."""
    found: list[dict[str, Any]] = []
    for ranks in (2, 4):
        bf16, fp32 = Tolerance(1e-3 * ranks, 8e-3 * ranks), Tolerance(1e-5, 2e-6)
        for mask in ("full", "causal"):
            for dtype, both in ((BF16, bf16), (FP32, fp32)):
                fixed = {
                    "source": "PyTorch",
                    "mask": mask,
                    "dtype": dtype,
                    "uniform": True,
                }
                limits = {"output": both, "gradients": both}
                shape = _ring(ranks, 128, B=2, H=8, D=32, theirs="(8, 8, 1024, 32)")
                found.append(fixed | limits | shape)
    return found


def _ring(ranks: int, rows: int, *, H: int, theirs: str, B: int = 1, **more: Any) -> dict[str, Any]:
    """A rank's rows against the keys of all ranks, one hop each, with as many key heads."""
    shape = {"S": rows, "K": rows * ranks, "hops": ranks, "B": B, "Hq": H, "Hkv": H, "D": 128}
    return {"theirs": f"{theirs}, {ranks} ranks"} | shape | more


def _all() -> list[PublicCase]:
    own = set(PublicCase.__dataclass_fields__)
    found = []
    entries = [*_nki_library(), *_transformer_engine(), *_ring_flash_attention(), *_pytorch()]
    for index, entry in enumerate(entries):
        entry = {"generation": GENERATIONS[index % 3], "seed": index, **entry}
        entry.setdefault("E", entry["D"])
        if entry["generation"] == "gen2" and entry.get("cores") == 2:
            entry["generation"] = "gen3"
        if entry["mask"] == "documents":
            entry["K"] = entry["S"]
        case = KernelCase(**{k: v for k, v in entry.items() if k not in own})
        found.append(PublicCase(case=case, **{k: v for k, v in entry.items() if k in own}))
    return found


PUBLIC = _all()
