"""The small kernels beside attention: delta, the merge of two results, and the order of tokens.

Each against plain PyTorch in fp64 on every generation, ragged lengths included, with the error of
the same maths in fp32 as its budget; permutations exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from budgets import assert_within_budget
from torch import Tensor

from nxd_cp.attention import ring_attention
from nxd_cp.backends import kernel_limits, kernel_support
from nxd_cp.context import CPContext
from nxd_cp.inference.attend import merge_all
from nxd_cp.schedule import token_runs
from nxd_cp.sharding import in_rank_order, shard
from nxd_cp.simulators.nki_api import load, record

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
    nothing = torch.full_like(lse[empty], package.tiles.EMPTY_LSE)
    assert torch.equal(lse[empty], nothing), "lse of empty rows"
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
        )[:2]
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


# What the host does with them


@pytest.mark.parametrize("backend", ["simulate_loops", "simulate_ring"])
def test_every_backend_of_the_kernels_has_these_beside_it(backend: str) -> None:
    cp, x = CPContext.local(2).contexts[0], normal(1, 8, 3, seed=1)
    assert torch.equal(in_rank_order(x, cp, backend=backend), in_rank_order(x, cp))


def test_the_backward_of_a_ring_takes_delta_from_the_kernel() -> None:
    q = normal(1, 2, 40, 16, seed=1).requires_grad_()
    o = ring_attention(q, q, q, backend="simulate")
    with record() as log:
        o.backward(normal(1, 2, 40, 16, seed=2))
    files = {Path(r.file).name for r in log}
    assert files >= {"row_delta.py", "flash_bwd.py"}


@pytest.mark.parametrize("cores", [1, 2])
def test_rows_of_any_number_are_shared_and_cut_into_launches(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_support, "ROW_LIMIT", 100)
    host = kernel_support.SupportKernels("simulate", "gen3", cores=cores)
    do, o = normal(1, 3, 111, 48, seed=1).bfloat16(), normal(1, 3, 111, 48, seed=2)
    with record() as log:
        found = host.row_delta(do.transpose(0, 1), o.transpose(0, 1)).transpose(0, 1)
    assert log.counts()["tensor_reduce"] == ceil(333 / (100 * cores))
    truth, plain = reference_delta(do.double(), o.double()), reference_delta(do.float(), o)
    assert_within_budget("delta", found.unsqueeze(-1), truth, plain)
    parts_of_rows = parts(111, 3.0)
    oa, la, ob, lb = (x.narrow(1, 0, 1) for x in parts_of_rows)
    o, lse = host.merge((oa, la.squeeze(-1)), (ob, lb.squeeze(-1)))
    truth = reference_merge(*(x.double() for x in (oa, la, ob, lb)))
    plain = reference_merge(oa, la, ob, lb)
    assert torch.equal(lse == -torch.inf, truth[1].squeeze(-1) == -torch.inf)
    assert_within_budget("o", o, truth[0], plain[0])
    seen = lse > -torch.inf
    assert_within_budget("lse", lse[seen], truth[1].squeeze(-1)[seen], plain[1].squeeze(-1)[seen])


def test_parts_of_a_split_cache_are_merged_by_the_kernel() -> None:
    make = [(normal(2, 4, 3, 32, seed=s), normal(2, 4, 3, seed=s + 9)) for s in range(3)]
    make[1][0][:, :, 0], make[1][1][:, :, 0] = 0.0, -torch.inf
    sinks = normal(4, seed=20)
    with record() as log:
        found = merge_all(make, sinks, backend="simulate")
    assert {Path(r.file).name for r in log} == {"merge.py"}
    exact = merge_all([(o.double(), lse.double()) for o, lse in make], sinks, backend="torch")
    for name, x, y, z in zip(
        ("o", "lse"), found, exact, merge_all(make, sinks, backend="torch"), strict=True
    ):
        assert_within_budget(name, x, y, z)


WIDE_DTYPES = [torch.int64, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", [*WIDE_DTYPES, torch.bool, torch.uint8], ids=str)
def test_numbers_that_nki_has_not_are_moved_bit_by_bit(dtype: torch.dtype) -> None:
    x = (2.0**40 * normal(2, 24, 5, seed=1).double()).to(dtype)
    cp = CPContext.local(3).contexts[0]
    for one in (x, x[..., 0]):
        there = in_rank_order(one, cp, backend="simulate")
        assert torch.equal(there, in_rank_order(one, cp, backend="torch"))
        assert torch.equal(in_rank_order(there, cp, inverse=True, backend="simulate"), one)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -2])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_a_sequence_in_rank_order_is_what_shard_gives_and_comes_back(
    layout: str, dim: int, dtype: torch.dtype
) -> None:
    group = CPContext.local(3, layout=layout)
    x = (100 * normal(12, 12, 5, seed=1)).to(dtype)
    parts = [shard(x, cp, dim=dim) for cp in group.contexts]
    for backend in ("torch", "simulate"):
        there = in_rank_order(x, group.contexts[1], dim, backend=backend)
        assert torch.equal(there, torch.cat(parts, dim)), backend
        assert torch.equal(
            in_rank_order(there, group.contexts[0], dim, inverse=True, backend=backend), x
        )


@pytest.mark.parametrize("backend", ["torch", "simulate"])
def test_the_gradient_of_an_order_is_its_inverse(backend: str) -> None:
    cp = CPContext.local(2).contexts[0]
    x, g = normal(2, 8, 3, seed=1).requires_grad_(), normal(2, 8, 3, seed=2)
    in_rank_order(x, cp, backend=backend).backward(g)
    assert torch.equal(x.grad, in_rank_order(g, cp, inverse=True))


def host_limit(call: Callable[[kernel_support.SupportKernels], Any], cores: int = 1) -> None:
    call(kernel_support.SupportKernels("simulate", "gen3", cores=cores))


ROWS, WIDE = torch.zeros(1, 2, 8, 16), torch.zeros(1, 1, 4, 300)
LIMITS = {
    "row_delta: expected two tensors of one shape, got .* cut them": (
        lambda host: host.row_delta(ROWS, ROWS[:, :1])
    ),
    "row_delta: expected bfloat16, float16, float32, got torch.float64; cast it": (
        lambda host: host.row_delta(ROWS, ROWS.double())
    ),
    "row_delta: expected a head dim of at most 256, got 300; use PyTorch": (
        lambda host: host.row_delta(WIDE, WIDE)
    ),
    "merge: expected float32, got torch.bfloat16; cast it": (
        lambda host: host.merge((ROWS.bfloat16(), ROWS[..., 0]), (ROWS.bfloat16(), ROWS[..., 0]))
    ),
    r"merge: expected lse \[1, 2, 8\] in float32, got \[1, 2, 8, 1\] .*; cut or cast": (
        lambda host: host.merge((ROWS, ROWS[..., :1]), (ROWS, ROWS[..., 0]))
    ),
    r"row_delta: expected .batch, heads, rows, head dim. .*, got \[2, 8, 16\]; reshape": (
        lambda host: host.row_delta(ROWS[0], ROWS[0])
    ),
    r"row_delta: expected .* without an empty dim, got \[1, 2, 0, 16\]; reshape": (
        lambda host: host.row_delta(ROWS[:, :, :0], ROWS[:, :, :0])
    ),
    r"permute_tokens: expected .batch, tokens, .* got \[8\]; unsqueeze it": (
        lambda host: host.permute(ROWS[0, 0, :, 0], ((0, 8, 1),))
    ),
    r"permute_tokens: .* from \(0, 1, 1\) on, got \(7, 8, -1\); cut a run that goes back": (
        lambda host: host.permute(ROWS[0, :, :, 0], ((7, 8, -1),))
    ),
    r"permute_tokens: .* got \(0, 8, 0\); cut": (
        lambda host: host.permute(ROWS[0, :, :, 0], ((0, 8, 0),))
    ),
    "permute_tokens: expected runs that hold each of 8 tokens once, got 7 in 1 runs; take": (
        lambda host: host.permute(ROWS[0, :, :, 0], ((0, 7, 1),))
    ),
    "permute_tokens: expected runs that hold each of 8 tokens once, got 9 in 2 runs; take": (
        lambda host: host.permute(ROWS[0, :, :, 0], ((0, 8, 1), (3, 1, 1)))
    ),
}


@pytest.mark.parametrize("message", LIMITS)
def test_limits_are_checked_before_a_launch(message: str) -> None:
    with record() as log, pytest.raises(ValueError, match=message):
        host_limit(LIMITS[message])
    assert len(log) == 0


ODD = {
    "two runs": ("zigzag", 1, 10),
    "three runs": ("striped", 3, 24),
    "one run": ("contiguous", 1, 7),
    "more runs than one": ("contiguous", 3, 9),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("layout", "size", "seq_len"), ODD.values(), ids=ODD)
def test_two_cores_share_the_runs_of_an_odd_batch(
    layout: str, size: int, seq_len: int, batch: int
) -> None:
    x, runs = normal(batch, seq_len, 3, seed=1), runs_of(layout, size, seq_len)
    one, two = (kernel_support.SupportKernels("simulate", "gen3", cores=c) for c in (1, 2))
    with record() as log:
        there = two.permute(x, runs)
    assert torch.equal(there, one.permute(x, runs))
    assert torch.equal(two.permute(there, runs, inverse=True), x)
    assert len(log.cores[0, 0]) == len(log.cores[0, 1]) > 0


def test_an_odd_run_is_cut_so_that_two_cores_move_about_as_many_tokens() -> None:
    assert kernel_support._cut_one(runs_of("striped", 3, 30)) == (
        (0, 10, 3),
        (1, 5, 3),
        (16, 5, 3),
        (2, 10, 3),
    )
    assert kernel_support._cut_one(((0, 1, 1), (1, 1, 1), (2, 3, 1))) == (
        (0, 1, 1),
        (1, 1, 1),
        (2, 1, 1),
        (3, 2, 1),
    )


def test_too_many_runs_and_single_odd_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    single = tuple((i, 1, 1) for i in range(3))
    said = r"or a run, that the 2 cores of a launch can share, got 1 x 3 runs of one token; use co"
    with record() as log, pytest.raises(ValueError, match=said):
        host_limit(lambda host: host.permute(torch.zeros(1, 3, 2), single), cores=2)
    assert len(log) == 0
    host_limit(lambda host: host.permute(torch.zeros(2, 3, 2), single), cores=2)
    x = torch.zeros(3, 8, 2)
    with pytest.raises(ValueError, match=r"cores=1, or 2 from gen3 .trn2., got 2 on gen2"):
        kernel_support.SupportKernels("simulate", "gen2", cores=2)
    runs = tuple((i, 1, 1) for i in range(8))
    monkeypatch.setattr(kernel_limits, "MAX_INSTRUCTIONS", 8)
    with record() as log:
        host_limit(lambda host: host.permute(x, runs))
    assert log.counts()["dma_copy"] == 24, "one launch per batch element"
    monkeypatch.setattr(kernel_limits, "MAX_INSTRUCTIONS", 7)
    with pytest.raises(ValueError, match=r"at most 7 runs .one DMA each., got 8; permute in PyT"):
        host_limit(lambda host: host.permute(x, runs))
