"""The NKI kernels in the simulator, block by block and round the ring, against fp64.

Letters: S query rows, K keys; Hq and Hkv query and key/value heads; D head dim.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from budgets import (
    FP32_GRADIENT,
    FP32_OUTPUT,
    assert_close,
    assert_within_budget,
    error,
)
from cases import NAMES, Case, cut, inputs, join_all, one_device, truth
from torch import Tensor

from nxd_cp import reference
from nxd_cp.attention import ring_attention
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.context import CPContext
from nxd_cp.simulators.nki_api import record

GENERATIONS = ("gen2", "gen3", "gen4")
MASKS = ("full", "causal", "strict")


@dataclass(frozen=True)
class Block:
    """One rectangle; `str` is the test id."""

    generation: str
    mask: str
    dtype: torch.dtype = torch.float32
    S: int = 256
    K: int = 256
    Hq: int = 2
    Hkv: int = 1
    D: int = 64
    gain: float = 1.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.generation}-{self.mask}-{dtype}-S{self.S}-K{self.K}-H{self.Hq}-G{self.Hkv}"
            f"-D{self.D}-x{self.gain:g}"
        )

    @property
    def scale(self) -> float:
        return self.D**-0.5


def problem(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do with unit variance, q times the gain, rounded to the block's dtype."""
    shapes = ((block.Hq, block.S), (block.Hkv, block.K), (block.Hkv, block.K), (block.Hq, block.S))
    q, k, v, do = (torch.randn(1, h, s, block.D) for h, s in shapes)
    return tuple(x.to(block.dtype) for x in (q * block.gain, k, v, do))


def kernels(block: Block, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """o, lse, dq, dk, dv by the simulated kernels."""
    q, k, v, do = tensors
    backend = KernelBackend("simulate", block.generation)
    o, lse = backend.forward(q, k, v, mask=block.mask, scale=block.scale)
    delta = (do.float() * o).sum(-1)
    grads = backend.backward(do, q, k, v, o, lse, delta, mask=block.mask, scale=block.scale)
    return (o, lse, *grads)


def exact(block: Block, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """o, lse, dq, dk, dv in fp64."""
    q, k, v, do = (x.double() for x in tensors)
    o, lse = reference.attention(q, k, v, mask=block.mask, scale=block.scale)
    grads = reference.attention_backward(do, q, k, v, mask=block.mask, scale=block.scale)
    return (o, lse, *grads)


def flash(block: Block, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """o, dq, dk, dv by PyTorch's own flash attention in the block's dtype.

    A strict block is a causal one without the first query and the last key.
    """
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    rows, keys = slice(None), slice(None)
    if block.mask == "strict":
        rows, keys = slice(1, None), slice(None, -1)
    o = torch.zeros_like(q)
    o[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, rows],
        k[:, :, keys],
        v[:, :, keys],
        is_causal=block.mask != "full",
        scale=block.scale,
        enable_gqa=True,
    )
    o.backward(tensors[3])
    return (o.detach(), q.grad, k.grad, v.grad)


def check(block: Block) -> None:
    """fp32: the absolute bounds. bf16: about as good as PyTorch's bf16 flash attention."""
    tensors = problem(block)
    o, lse, *grads = kernels(block, tensors)
    o_true, lse_true, *grads_true = exact(block, tensors)
    seen = lse_true > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert_close("lse", lse[seen], lse_true[seen], FP32_OUTPUT)
    found, expected = (o, *grads), (o_true, *grads_true)
    if block.dtype == torch.float32:
        bounds = (FP32_OUTPUT, FP32_GRADIENT, FP32_GRADIENT, FP32_GRADIENT)
        for name, x, y, bound in zip(NAMES, found, expected, bounds, strict=True):
            assert_close(name, x, y, bound)
        return
    for name, x, y, z in zip(NAMES, found, expected, flash(block, tensors), strict=True):
        assert_within_budget(name, x, y, z)


BLOCKS = [
    *(Block(g, m, t) for g, m, t in product(GENERATIONS, MASKS, (torch.float32, torch.bfloat16))),
    *(Block("gen2", "causal", S=s, K=s, D=32) for s in (128, 384, 640, 1024)),
    *(Block("gen3", "strict", S=s, K=s, D=32) for s in (128, 384, 640, 1024)),
    *(Block("gen4", "full", S=s, K=k) for s, k in ((128, 640), (640, 128), (256, 1024))),
    *(Block("gen3", "causal", torch.bfloat16, D=d) for d in (16, 80, 128)),
    *(Block("gen2", "causal", Hq=h, Hkv=g, S=128, K=128) for h, g in ((3, 3), (6, 3), (8, 1))),
    Block("gen4", "strict", torch.bfloat16, S=1024, K=1024, Hq=1, D=128),
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_and_its_gradients_are_those_of_fp64(block: Block) -> None:
    check(block)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_logits_in_the_thousands_neither_overflow_nor_lose_a_row(
    generation: str, mask: str
) -> None:
    block = Block(generation, mask, S=640, K=640, D=64, gain=3000.0)
    tensors = problem(block)
    o, lse, *grads = kernels(block, tensors)
    _, lse_true, *_ = exact(block, tensors)
    seen = lse_true > -torch.inf
    assert lse_true[seen].abs().max() > 5000.0
    assert torch.isfinite(torch.cat([x.flatten() for x in (o, *grads)])).all()
    assert torch.equal(lse > -torch.inf, seen)
    same_maths = reference.attention(*tensors[:3], mask=mask, scale=block.scale)[1]
    assert_close(
        "lse", lse[seen], lse_true[seen], 2 * error(same_maths[seen], lse_true[seen]).max_abs
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_row_that_sees_nothing_is_zero_and_has_zero_gradients(generation: str) -> None:
    block = Block(generation, "strict", S=128, K=128)
    o, lse, dq, dk, dv = kernels(block, problem(block))
    assert torch.equal(o[:, :, 0], torch.zeros_like(o[:, :, 0]))
    assert torch.equal(dq[:, :, 0], torch.zeros_like(dq[:, :, 0]))
    assert bool((lse[:, :, 0] == -torch.inf).all())
    assert torch.equal(dk[:, :, -1], torch.zeros_like(dk[:, :, -1]))
    assert torch.equal(dv[:, :, -1], torch.zeros_like(dv[:, :, -1]))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_that_are_empty_in_the_whole_sequence_add_nothing(generation: str) -> None:
    block = Block(generation, "causal", S=128, K=128)
    q, k, v, do = problem(block)
    lse = torch.full((1, block.Hq, block.S), -torch.inf)
    grads = KernelBackend("simulate", generation).backward(
        do, q, k, v, torch.zeros_like(q), lse, torch.zeros_like(lse), mask="causal", scale=1.0
    )
    for x in grads:
        assert torch.equal(x, torch.zeros_like(x))


RINGS = [
    Case(layout=layout, size=size, causal=causal, S=512, Hq=2, Hkv=1, D=32, dtype=dtype)
    for layout, size, causal, dtype in (
        ("zigzag", 2, True, torch.float32),
        ("zigzag", 2, True, torch.bfloat16),
        ("striped", 2, True, torch.float32),
        ("striped", 4, True, torch.bfloat16),
        ("contiguous", 4, True, torch.float32),
        ("contiguous", 2, False, torch.float32),
    )
]


def ring(case: Case, generation: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """o, dq, dk, dv from a ring of threads whose blocks the simulated kernels compute."""
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)

    def on_each_rank(cp: CPContext) -> tuple[Tensor, ...]:
        q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = ring_attention(*leaves, cp=cp, causal=case.causal, backend="simulate")
        o.backward(do)
        return (o.detach(), *(x.grad for x in leaves))

    group = CPContext.local(case.size, layout=case.layout)
    return join_all(group.run(on_each_rank), case)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", RINGS, ids=str)
def test_a_ring_of_simulated_kernels_is_fp64_attention(
    case: Case, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ring(case, generation, monkeypatch)
    if case.dtype == torch.float32:
        bounds = (FP32_OUTPUT, FP32_GRADIENT, FP32_GRADIENT, FP32_GRADIENT)
        for name, x, y, bound in zip(NAMES, found, truth(case), bounds, strict=True):
            assert_close(name, x, y, bound)
        return
    for name, x, y, z in zip(NAMES, found, truth(case), one_device(case), strict=True):
        assert_within_budget(name, x, y, z)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_only_gen2_transposes_with_the_identity(generation: str) -> None:
    block = Block(generation, "causal", S=128, K=128)
    with record() as log:
        kernels(block, problem(block))
    opcodes = log.counts()
    assert ("nc_transpose" in opcodes) == (generation != "gen2")
    assert opcodes["nc_matmul"] > 0


# Faults planted in the kernels: what each one changes, and why the suite must see it.


def swap_key_gradients(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.add_key_gradients
    monkeypatch.setattr(
        module, "add_key_gradients", lambda dk, dv, p, ds, q, do: right(dv, dk, p, ds, q, do)
    )


def forget_the_diagonal(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mask_diagonal", lambda tile, mask, fill: None)


def shift_the_diagonal(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.mask_diagonal
    monkeypatch.setattr(
        module, "mask_diagonal", lambda tile, mask, fill: right(tile, "strict", fill)
    )


def forget_to_rescale(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "update_softmax", keep_alpha_at_one(module))


def keep_alpha_at_one(module: object) -> Callable[..., object]:
    right = module.update_softmax

    def wrong(s: object, m: object, l: object, scale: float, dtype: object) -> object:
        p, alpha = right(s, m, l, scale, dtype)
        module.nisa.memset(dst=alpha, value=1.0)
        return p, alpha

    return wrong


def scale_twice(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.store_key_gradient
    monkeypatch.setattr(
        module,
        "store_key_gradient",
        lambda hbm, b, g, psum, at, f: right(hbm, b, g, psum, at, f * f),
    )


FAULTS = [
    ("flash_bwd", swap_key_gradients),
    ("flash_fwd", forget_the_diagonal),
    ("flash_bwd", forget_the_diagonal),
    ("flash_fwd", shift_the_diagonal),
    ("flash_fwd", forget_to_rescale),
    ("flash_bwd", scale_twice),
]


@pytest.mark.parametrize(
    ("file", "plant"), FAULTS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_fault_planted_in_a_kernel_is_caught(
    file: str, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nxd_cp.simulators.nki_api import load

    block = Block("gen3", "causal", S=640, K=640, D=32)
    check(block)
    plant(getattr(load("nxd_cp.kernels", generation="gen3"), file), monkeypatch)
    with pytest.raises(AssertionError, match=r"expected max|lse"):
        check(block)


REFUSED = [
    ({"dtype": torch.float16}, "bfloat16 or all float32"),
    ({"D": 160}, "head dim of at most 128"),
    ({"S": 192}, "multiple of 128 rows, got 192"),
    ({"S": 16384, "Hq": 8, "Hkv": 1, "D": 128}, "bytes of SBUF per partition"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_the_kernels_cannot_take_is_refused_before_any_message(
    change: dict[str, object], message: str
) -> None:
    shape = {"S": 256, "Hq": 2, "Hkv": 1, "D": 64, "dtype": torch.float32, **change}

    def on_each_rank(cp: CPContext) -> tuple[str, int]:
        q, k, v = (
            torch.empty(1, shape[h], shape["S"], shape["D"], dtype=shape["dtype"])
            for h in ("Hq", "Hkv", "Hkv")
        )
        with pytest.raises(ValueError, match=message) as caught:
            ring_attention(q, k, v, cp=cp, backend="simulate")
        return str(caught.value), cp.transport.counters.ring_messages

    for text, messages in CPContext.local(2, layout="contiguous").run(on_each_rank):
        assert "expected" in text
        assert "got" in text
        assert messages == 0


SIMULATED_NKI = """
from nxd_cp.simulators.nki_api import install
from nxd_cp.backends.neuron import KernelBackend
install()
import nki.language
try:
    KernelBackend("nki")
except ValueError as error:
    print(error)
"""


def test_the_device_backend_takes_neither_a_missing_nor_a_simulated_nki() -> None:
    with pytest.raises(ValueError, match="AWS Neuron SDK"):
        KernelBackend("nki")
    said = subprocess.run([sys.executable, "-c", SIMULATED_NKI], capture_output=True, text=True)
    assert "AWS Neuron SDK" in said.stdout, said.stderr
