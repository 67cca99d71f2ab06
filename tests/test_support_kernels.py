"""The small kernels beside attention: delta, the merge of two results, and the order of tokens.

Each against plain PyTorch in fp64 on every generation, ragged lengths included, with the error of
the same maths in fp32 as its budget; permutations exactly.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from budgets import assert_within_budget
from torch import Tensor

from nxd_cp.schedule import token_runs
from nxd_cp.simulators.nki_api import load

GENERATIONS = ("gen2", "gen3", "gen4")
LENGTHS = (1, 127, 128, 300)


def kernels(generation: str) -> ModuleType:
    """A fresh copy of all kernels, bound to the simulator."""
    return load("nxd_cp.kernels", generation=generation)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# delta


def reference_delta(do: Tensor, o: Tensor) -> Tensor:
    """rowsum(do * o), in the dtype of the arguments."""
    return (do * o).sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_delta_is_that_of_fp64(generation: str, length: int, dtype: torch.dtype) -> None:
    do, o = normal(2, 3, length, 48, seed=1, dtype=dtype), normal(2, 3, length, 48, seed=2)
    found = kernels(generation).row_delta.row_delta(do, o)
    truth, plain = reference_delta(do.double(), o.double()), reference_delta(do.float(), o)
    assert_within_budget("delta", found, truth, plain)


def test_a_delta_summed_in_bf16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    package = kernels("gen3")
    nl = package.row_delta.nl
    right = nl.ndarray

    def narrow(shape: tuple[int, ...], dtype: object, buffer: object) -> object:
        return right(shape, dtype=nl.bfloat16 if len(shape) == 2 else dtype, buffer=buffer)

    monkeypatch.setattr(nl, "ndarray", narrow)
    do, o = normal(1, 1, 128, 48, seed=1), normal(1, 1, 128, 48, seed=2)
    found = package.row_delta.row_delta(do, o)
    with pytest.raises(AssertionError, match="expected at most"):
        assert_within_budget(
            "delta", found, reference_delta(do.double(), o.double()), reference_delta(do, o)
        )


# merge


def reference_merge(oa: Tensor, la: Tensor, ob: Tensor, lb: Tensor) -> tuple[Tensor, Tensor]:
    """The merge in the dtype of the arguments; empty rows (lse = -inf) give 0 and -inf."""
    lse = torch.logaddexp(la, lb)
    weights = [torch.where(x == -torch.inf, 0.0, (x - lse).exp()) for x in (la, lb)]
    return weights[0] * oa + weights[1] * ob, lse


def parts(length: int, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two results of the same rows; rows 0, 3, 6.. saw nothing in a, 0, 2, 4.. nothing in b."""
    oa, ob = normal(2, 2, length, 40, seed=3), normal(2, 2, length, 40, seed=4)
    la, lb = spread * normal(2, 2, length, 1, seed=5), spread * normal(2, 2, length, 1, seed=6)
    for o, lse, every in ((oa, la, 3), (ob, lb, 2)):
        o[:, :, ::every] = 0.0
        lse[:, :, ::every] = -torch.inf
    return oa, la, ob, lb


def check_merge(package: ModuleType, length: int, spread: float, sentinel: float) -> None:
    """Outputs against fp64; `sentinel` is the lse of empty rows that the kernel is given."""
    oa, la, ob, lb = parts(length, spread)
    given = [x.clamp_min(sentinel) for x in (la, lb)]
    o, lse = package.merge.merge(oa, given[0], ob, given[1])
    empty = (la == -torch.inf) & (lb == -torch.inf)
    assert bool(empty.any())
    assert bool((lse[empty] <= package.tiles.EMPTY_LSE_LIMIT).all()), "lse of empty rows"
    assert not o[empty.expand_as(o)].any(), "o of empty rows"
    truth = reference_merge(*(x.double() for x in (oa, la, ob, lb)))
    plain = reference_merge(oa, la, ob, lb)
    assert_within_budget("o", o, truth[0], plain[0])
    seen = ~empty
    if bool(seen.any()):
        assert_within_budget("lse", lse[seen], truth[1][seen], plain[1][seen])


@pytest.mark.parametrize("sentinel", [-torch.inf, -1.0e30])
@pytest.mark.parametrize("spread", [1.0, 3e4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_merge_is_that_of_fp64(
    generation: str, length: int, spread: float, sentinel: float
) -> None:
    check_merge(kernels(generation), length, spread, sentinel)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_two_halves_of_the_keys_merge_to_attention_over_all(generation: str) -> None:
    package = kernels(generation)
    q, k, v = (normal(1, 2, 200, 32, seed=seed) for seed in (7, 8, 9))
    halves = [
        package.flash_fwd.flash_fwd(
            q, k[:, :, at].contiguous(), v[:, :, at].contiguous(), "full", 0.2
        )
        for at in (slice(0, 90), slice(90, 200))
    ]
    o, _ = package.merge.merge(*halves[0], *halves[1])
    exact, plain = (
        torch.softmax(0.2 * x @ y.mT, -1) @ z
        for x, y, z in ((q.double(), k.double(), v.double()), (q, k, v))
    )
    assert_within_budget("o", o, exact, plain)


FAULTS = {
    "the weights of a and b exchanged": lambda lse, a, b: (lse, b, a),
    "weights that do not add up to 1": lambda lse, a, b: (lse, a, a),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_wrong_weight_is_caught(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    package = kernels("gen3")
    right = package.merge.weigh
    monkeypatch.setattr(package.merge, "weigh", lambda a, b: fault(*right(a, b)))
    with pytest.raises(AssertionError, match="expected at most"):
        check_merge(package, 300, 1.0, -1.0e30)


def test_a_sentinel_of_minus_infinity_inside_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    package = kernels("gen3")
    monkeypatch.setattr(package.merge, "EMPTY_LSE", float("-inf"))
    with pytest.raises(AssertionError):
        check_merge(package, 300, 1.0, -torch.inf)


# order of tokens


def runs_of(layout: str, size: int, seq_len: int) -> tuple[tuple[int, int, int], ...]:
    """The runs of all ranks, as the kernel takes them."""
    return tuple(
        (run.start, len(run), run.step)
        for rank in range(size)
        for run in token_runs(layout, size, rank, seq_len)
    )


def reference_order(layout: str, size: int, seq_len: int) -> list[int]:
    """Token numbers, rank by rank, without runs: what the layouts mean."""
    half = seq_len // (2 * size)
    order = []
    for rank in range(size):
        if layout == "striped":
            order += [token for token in range(seq_len) if token % size == rank]
        else:
            mine = (rank, 2 * size - 1 - rank)
            order += [token for token in range(seq_len) if token // half in mine]
    return order


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "chunk"), [(2, 1), (3, 7), (4, 75)])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_tokens_go_to_their_ranks_and_back_bit_by_bit(
    generation: str, layout: str, size: int, chunk: int, dtype: torch.dtype
) -> None:
    seq_len = 2 * size * chunk
    permute, runs = kernels(generation).permute.permute_tokens, runs_of(layout, size, seq_len)
    x = torch.arange(2 * seq_len * 3, dtype=torch.int32).reshape(2, seq_len, 3) + 2**24
    x = x if dtype == torch.int32 else normal(2, seq_len, 3, seed=1, dtype=dtype)
    there = permute(x, runs)
    assert torch.equal(there, x[:, reference_order(layout, size, seq_len)])
    assert torch.equal(permute(there, runs, inverse=True), x)


def test_a_wrong_order_is_caught() -> None:
    x = torch.arange(24).reshape(1, 24, 1).int()
    found = kernels("gen3").permute.permute_tokens(x, runs_of("contiguous", 3, 24))
    assert not torch.equal(found, x[:, reference_order("zigzag", 3, 24)])
    assert not np.array_equal(found, x[:, reference_order("striped", 3, 24)])


@pytest.mark.parametrize("generation", ["gen3", "gen4"])
def test_two_cores_share_the_work(generation: str) -> None:
    package = kernels(generation)
    do, o = normal(1, 2, 130, 32, seed=1), normal(1, 2, 130, 32, seed=2)
    assert torch.equal(package.row_delta.row_delta[2](do, o), package.row_delta.row_delta(do, o))
    lse = normal(1, 2, 130, 1, seed=3)
    both, one = package.merge.merge[2](do, lse, o, lse), package.merge.merge(do, lse, o, lse)
    assert all(torch.equal(x, y) for x, y in zip(both, one, strict=True))
    x, runs = normal(2, 24, 5, seed=4), runs_of("zigzag", 3, 24)
    permute = package.permute.permute_tokens
    assert torch.equal(permute[2](x, runs), permute(x, runs))
