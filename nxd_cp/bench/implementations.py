"""What can be timed on a case: this package's kernels, and NxD's where they can be imported.

Does: turn a case and its inputs into a call that computes o, or dq, dk and dv. Does not: time it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nxd_cp.backends.base import Backend, QueryRows, Scores
from nxd_cp.bench.cases import Case
from nxd_cp.schedule import MaskKind

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """q, do, o [1, H, S, D]; k, v [1, G, K, D]; lse, delta [1, H, S] fp32, of whole rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    o: Tensor
    lse: Tensor
    delta: Tensor

    def to(self, device: str) -> Inputs:
        """All of them on `device`."""
        return Inputs(*(getattr(self, field.name).to(device) for field in fields(self)))


class Implementation(Protocol):
    """name: in the report. least_length: the shortest sequence that it takes."""

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def least_length(self) -> int:
        """See the class."""
        ...

    def refuses(self, case: Case) -> str:
        """Why it cannot do `case`, or ""."""
        ...

    def prepare(self, case: Case, x: Inputs) -> Call:
        """A call that computes (o,) of a forward, or (dq, dk, dv) of a backward."""
        ...


@dataclass(frozen=True)
class OurKernels:
    """`kernels/` of this package, by its backend "nki" or "simulate". cores: of a launch (LNC)."""

    backend: Backend
    cores: int = 1
    name: str = "nxd-cp"
    least_length: int = 128

    def refuses(self, case: Case) -> str:
        """Two cores share heads."""
        heads = (case.num_kv_heads, case.num_heads // case.num_kv_heads)
        if all(number % self.cores for number in heads):
            return f"LNC {self.cores} needs a number of heads that {self.cores} cores can share"
        return ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        """See `Implementation.prepare`."""
        scores = Scores(cast(MaskKind, case.mask), case.scale)
        if case.kernel == "flash_fwd":
            return lambda: (self.backend.forward(x.q, x.k, x.v, scores)[0],)
        rows = QueryRows(x.do, x.q, x.o, x.lse, x.delta)
        return lambda: tuple(self.backend.backward(rows, x.k, x.v, scores))


@dataclass(frozen=True)
class NxdKernels:
    """NxD's flash or ring attention on one core: [B, H, S, D] in and out, key/value heads repeated.

    attend(q, k, v, causal) calls it. multiple: sequence lengths that it takes.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    multiple: int

    @property
    def least_length(self) -> int:
        """One multiple."""
        return self.multiple

    def refuses(self, case: Case) -> str:
        """Lengths and masks that NxD's functions do not take."""
        if case.mask == "strict":
            return f"{self.name} has no strict mask"
        if case.queries != case.keys or case.queries % self.multiple:
            return f"{self.name} takes equal lengths of a multiple of {self.multiple}"
        return ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        """See `Implementation.prepare`; the backward is autograd's, over a forward done before."""
        repeat = case.num_heads // case.num_kv_heads
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]

        def forward() -> Tensor:
            q, k, v = leaves
            k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
            return self.attend(q, k, v, case.mask == "causal")

        if case.kernel == "flash_fwd":
            return lambda: (forward(),)
        o = forward()
        return lambda: torch.autograd.grad(o, leaves, x.do, retain_graph=True)


def nxd_kernels(
    load: Callable[[str], Any] = importlib.import_module, *, cores: int = 1
) -> tuple[list[NxdKernels], list[str]]:
    """NxD's kernels that can be imported here, and a sentence for each that cannot or, as its ring
    kernel, cannot run on `cores` physical cores.

    Signatures: NxD 0.18.0, kernels/{flash_attn,ring_attention_kernel}.py; untried on a device.
    """
    found: list[NxdKernels] = []
    notes: list[str] = []
    for name, module, function, multiple in (
        ("nxd flash", "neuronx_distributed.kernels.flash_attn", "nki_flash_attn_func", 2048),
        (
            "nxd ring",
            "neuronx_distributed.kernels.ring_attention_kernel",
            "nki_ring_attn_func",
            1024,
        ),
    ):
        try:
            attend = getattr(load(module), function)
        except (ImportError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            notes.append(f"baseline {name}: not timed, {function} cannot be imported ({reason})")
            continue
        if name == "nxd flash":
            found.append(NxdKernels(name, _flash(attend, cores), multiple))
        elif cores == 1:
            found.append(NxdKernels(name, _ring(attend), multiple))
        else:
            notes.append(f"baseline {name}: not timed, it has no LNC {cores}")
    return found, notes


def _flash(
    attend: Callable[..., Tensor], cores: int
) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    options = {"lnc": cores, "transpose_nki_inputs": False}
    return lambda q, k, v, causal: attend(q, k, v, causal=causal, **options)


def _ring(attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    return lambda q, k, v, causal: attend(q, k, v, 0, [(0, 0)], causal=causal)
