"""The torch backend, rectangle by rectangle, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from budgets import FP32_GRADIENT, FP32_OUTPUT, assert_close
from torch import Tensor

from nxd_cp import reference
from nxd_cp.backends import get_backend, torch_flash
from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.torch_flash import TorchBackend

MASKS = ("full", "causal", "strict")


@pytest.fixture(params=["flash", "plain"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    """The flash operator, and the plain path that other devices take (several row blocks)."""
    if request.param == "plain":
        monkeypatch.setattr(torch_flash, "has_flash", lambda q: False)
        monkeypatch.setattr(torch_flash, "_QUERY_BLOCK", 7)
    return TorchBackend()


def problem(Sq: int, Skv: int, Hq: int = 4, Hkv: int = 2, D: int = 16) -> list[Tensor]:
    return [torch.randn(2, h, s, D) for h, s in ((Hq, Sq), (Hkv, Skv), (Hkv, Skv), (Hq, Sq))]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (3, 3), (6, 3), (8, 1)])
@pytest.mark.parametrize("D", [16, 80])
def test_a_rectangle_is_the_reference(
    backend: TorchBackend, mask: str, Hq: int, Hkv: int, D: int
) -> None:
    Skv = 31 if mask != "full" else 19
    q, k, v, do = problem(31, Skv, Hq, Hkv, D)
    o, lse = backend.forward(q, k, v, Scores(mask, 0.25))
    exact = [x.double() for x in (q, k, v, do)]
    o_true, lse_true = reference.attention(*exact[:3], mask=mask, scale=0.25)
    assert_close("o", o, o_true, FP32_OUTPUT)
    seen = lse_true > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert_close("lse", lse[seen], lse_true[seen], FP32_OUTPUT)
    found = backend.backward(QueryRows(do, q, o, lse, (do * o).sum(-1)), k, v, Scores(mask, 0.25))
    expected = reference.attention_backward(exact[3], *exact[:3], mask=mask, scale=0.25)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert x.dtype == torch.float32
        assert_close(name, x, y, FP32_GRADIENT)


@pytest.mark.parametrize("mask", MASKS)
def test_partial_gradients_use_the_statistics_of_whole_rows(
    backend: TorchBackend, mask: str
) -> None:
    q, k, v, do = problem(12, 12)
    o, lse = torch.randn_like(q), torch.randn(2, 4, 12) + 4.0  # of a longer row
    delta = (do * o).sum(-1)
    found = backend.backward(QueryRows(do, q, o, lse, delta), k, v, Scores(mask, 0.25))
    expected = reference.block_backward(
        *(x.double() for x in (do, q, k, v, lse, delta)), mask=mask, scale=0.25
    )
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(name, x, y, FP32_GRADIENT)


@pytest.mark.parametrize("mask", MASKS)
def test_rows_without_anything_visible_add_nothing(backend: TorchBackend, mask: str) -> None:
    q, k, v, do = problem(6, 6)
    lse = torch.full((2, 4, 6), -torch.inf)
    o, delta = torch.zeros_like(q), torch.zeros(2, 4, 6)
    for x in backend.backward(QueryRows(do, q, o, lse, delta), k, v, Scores(mask, 0.25)):
        assert torch.equal(x, torch.zeros_like(x))


def test_pytorchs_operator_gives_lse_zero_for_a_masked_row_and_ours_does_not() -> None:
    q, k, v, _ = problem(4, 4, 2, 2)
    hidden = torch.full((4, 4), -torch.inf).triu()
    _, theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=hidden, scale=0.25
    )
    o, ours = TorchBackend().forward(q, k, v, Scores("strict", 0.25))
    assert torch.equal(theirs[:, :, 0], torch.zeros(2, 2))
    assert torch.equal(ours[:, :, 0], torch.full((2, 2), -torch.inf))
    assert torch.equal(o[:, :, 0], torch.zeros(2, 2, 16))


def test_one_strict_row_sees_nothing(backend: TorchBackend) -> None:
    q, k, v, do = problem(1, 1)
    o, lse = backend.forward(q, k, v, Scores("strict", 0.25))
    assert torch.equal(o, torch.zeros_like(q))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    for x in backend.backward(QueryRows(do, q, o, lse, lse * 0), k, v, Scores("strict", 0.25)):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_not_rounded_on_the_way(
    backend: TorchBackend, dtype: torch.dtype
) -> None:
    q, k, v, _ = (x.to(dtype) for x in problem(16, 16))
    o, lse = backend.forward(q, k, v, Scores("causal", 0.25))
    exact, _ = reference.attention(q.double(), k.double(), v.double(), mask="causal", scale=0.25)
    assert o.dtype == lse.dtype == torch.float32
    assert_close("o", o, exact, FP32_OUTPUT)


def test_names_become_backends_and_never_fall_back() -> None:
    cpu = torch.device("cpu")
    assert get_backend("auto", cpu).name == "torch"
    with pytest.raises(ValueError, match=r"expected one of torch, simulate, .*, auto, got 'cuda'"):
        get_backend("cuda", cpu)
