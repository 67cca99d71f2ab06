"""Prefill and decode over a cache split over ranks, against fp64 over the whole sequence."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import FP32_OUTPUT, assert_close, assert_within_budget
from ranks import RankGroup
from torch import Tensor

from nxd_cp import reference, shard, unshard
from nxd_cp.context import CPContext
from nxd_cp.debugging import debug
from nxd_cp.inference import KVCache, attend, decode, prefill
from nxd_cp.schedule import HEADER_BYTES

NUM_DECODED = 5


@dataclass(frozen=True)
class Case:
    """Sequences of a batch of 2: chunks of the prompt, then single tokens."""

    layout: str = "zigzag"
    size: int = 2
    chunks: tuple[int, ...] = (24, 24)
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    step: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = f"w{self.window}-c{self.softcap}-{'sinks' if self.sinks else 'plain'}"
        chunks = "+".join(map(str, self.chunks))
        return f"{self.layout}-cp{self.size}-{chunks}-{self.Hq}of{self.Hkv}-{kind}-T{self.step}"

    @property
    def total(self) -> int:
        return sum(self.chunks) + NUM_DECODED * self.step

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(11)
        heads = (self.Hq, self.Hkv, self.Hkv)
        return [
            torch.randn(2, h, self.total, self.D, generator=generator).to(self.dtype) for h in heads
        ]

    def options(self) -> dict[str, Any]:
        sinks = torch.linspace(-1.0, 2.0, self.Hq) if self.sinks else None
        return {"window": self.window, "softcap": self.softcap, "sinks": sinks}


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """o [2, Hq, total, D] of causal attention over everything, in `dtype`."""
    q, k, v = (x.to(dtype) for x in case.inputs())
    at = torch.arange(case.total)
    hidden = at[None] > at[:, None]
    if case.window is not None:
        hidden |= at[None] <= at[:, None] - case.window
    sinks = case.options()["sinks"]
    o, _ = reference.attention(
        q,
        k,
        v,
        mask=hidden,
        scale=case.D**-0.5,
        softcap=case.softcap,
        sinks=None if sinks is None else sinks.to(dtype),
    )
    return o


def generate(cp: CPContext, case: Case) -> Tensor:
    """Prompt in chunks, then tokens: the whole o, equal on all ranks."""
    q, k, v = case.inputs()
    cache = KVCache(
        batch=2,
        num_kv_heads=case.Hkv,
        head_dim=case.D,
        capacity=case.total,
        dtype=case.dtype,
    )
    done, outputs = 0, []
    for length in case.chunks:
        part = [shard(x[:, :, done : done + length], cp, dim=2) for x in (q, k, v)]
        o = prefill(*part, cache=cache, cp=cp, **case.options())
        outputs.append(unshard(o, cp, dim=2))
        done += length
    while done < case.total:
        rows = slice(done, done + case.step)
        o = decode(*(x[:, :, rows] for x in (q, k, v)), cache=cache, cp=cp, **case.options())
        outputs.append(o)
        done += case.step
    return torch.cat(outputs, dim=2)


CASES = [
    Case(layout=layout, size=size, Hq=Hq, Hkv=Hkv, window=window, softcap=softcap, sinks=sinks)
    for layout in ("zigzag", "striped", "contiguous")
    for size, Hq, Hkv in ((1, 3, 3), (2, 4, 2), (3, 8, 1), (4, 6, 3))
    for window, softcap, sinks in ((None, None, False), (7, None, True), (30, 2.0, False))
]
CASES += [Case(step=4), Case(size=4, step=3, window=5), Case(chunks=(8, 40, 16), size=4)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_and_tokens_are_attention_over_the_whole_sequence(case: Case) -> None:
    first, *others = CPContext.local(case.size, layout=case.layout).run(
        lambda cp: generate(cp, case)
    )
    assert_close(str(case), first, truth(case), FP32_OUTPUT)
    tail = slice(sum(case.chunks), None)
    assert all(torch.equal(first[:, :, tail], one[:, :, tail]) for one in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_error_is_that_of_one_device(dtype: torch.dtype) -> None:
    case = Case(size=4, dtype=dtype, D=64)
    found = CPContext.local(4).run(lambda cp: generate(cp, case))[0]
    assert found.dtype == dtype
    q, k, v = case.inputs()
    one_device = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert_within_budget(str(case), found, truth(case), one_device)


def over_gloo(group: dist.ProcessGroup, case: Case) -> Tensor:
    return generate(CPContext.from_group(group, layout=case.layout), case)


def test_processes_compute_what_threads_do(ranks: RankGroup) -> None:
    case = Case(size=3, Hq=8, Hkv=1, window=30)
    found = ranks.run(over_gloo, case, num_ranks=3)
    local = CPContext.local(3).run(lambda cp: generate(cp, case))
    assert all(torch.equal(x, y) for x, y in zip(found, local, strict=True))


# Sequences of unequal length

LENGTHS = torch.tensor([5, 24])


def generate_unequal(cp: CPContext) -> list[Tensor]:
    """A prompt padded with large numbers behind 5 and 24 tokens, then one token each."""
    case = Case(size=cp.size)
    q, k, v = (x[:, :, :24].clone() for x in case.inputs())
    for x in (k, v):
        x[0, :, 5:] = 1e4
    cache = KVCache(batch=2, num_kv_heads=2, head_dim=16, capacity=25, dtype=torch.float32)
    part = [shard(x, cp, dim=2) for x in (q, k, v)]
    prompt = unshard(prefill(*part, cache=cache, cp=cp, lengths=LENGTHS), cp, dim=2)
    token = [x[:, :, 30:31] for x in case.inputs()]
    o = decode(*token, cache=cache, cp=cp)
    return [prompt, o, cache.num_used.float(), cache.next_position.float()]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sequences_of_a_batch_may_end_at_different_places(size: int) -> None:
    results = CPContext.local(size).run(generate_unequal)
    prompt, o, _, total = results[0]
    assert total.tolist() == [6, 25]
    assert sum(used for _, _, used, _ in results).tolist() == [6, 25], "each token is stored once"
    q, k, v = (x.double() for x in Case().inputs())
    for row, length in enumerate(LENGTHS.tolist()):
        at = torch.cat([torch.arange(length), torch.tensor([30])])
        q_row, k_row, v_row = (x[row : row + 1, :, at] for x in (q, k, v))
        exact, _ = reference.attention(q_row, k_row, v_row, mask="causal", scale=0.25)
        assert_close("prompt", prompt[row : row + 1, :, :length], exact[:, :, :-1], FP32_OUTPUT)
        assert_close("token", o[row : row + 1], exact[:, :, -1:], FP32_OUTPUT)


def test_a_rank_that_holds_nothing_adds_nothing() -> None:
    def work(cp: CPContext) -> Tensor:
        cache = KVCache(batch=1, num_kv_heads=1, head_dim=8, capacity=2, dtype=torch.float32)
        x = torch.ones(1, 1, 1, 8)
        return decode(x, x, x, cache=cache, cp=cp, return_lse=True)

    for o, lse in CPContext.local(3).run(work):
        assert torch.equal(o, torch.ones(1, 1, 1, 8))
        assert float(lse) == pytest.approx(8 * 8**-0.5)


def test_a_decoded_token_moves_only_o_and_lse() -> None:
    def work(cp: CPContext) -> tuple[int, int]:
        cache = KVCache(batch=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float32)
        q, k = torch.randn(2, 6, 1, 8), torch.randn(2, 1, 1, 8)
        decode(q, k, k, cache=cache, cp=cp)
        counters = cp.transport.counters
        return counters.messages["gather"], counters.size_bytes["gather"]

    expected = (3, 3 * (2 * 6 * 1 * (8 + 1) * 4 + HEADER_BYTES))
    assert CPContext.local(4).run(work) == [expected] * 4


# Refusals


def refusal(cp: CPContext, change: dict[str, Any]) -> str:
    """Rank 1 makes a call that is wrong; then all make one that is right."""
    cache = KVCache(batch=1, num_kv_heads=2, head_dim=8, capacity=1, dtype=torch.float32)
    token = {"q": torch.ones(1, 4, 1, 8), "k": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 8)}
    mine = token | (change if cp.rank == 1 else {})
    q, k, v = (mine.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=r".") as caught:
        decode(q, k, v, cache=cache, cp=cp, **mine)
    assert not cache.num_used.any()
    o = decode(token["q"], token["k"], token["v"], cache=cache, cp=cp)
    assert torch.equal(o, torch.ones_like(o))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": torch.ones(1, 3, 1, 8)}, "k and v: expected equal shapes but for the head dim"),
        ({name: torch.ones(1, 1, 1, 8) for name in "kv"}, "k: expected [1, 2, tokens, 8] as in"),
        ({"q": torch.ones(1, 4, 2, 8)}, "q: expected [1, heads, 1, 8] to go with k"),
        (
            {"q": torch.ones(1, 3, 1, 8)},
            "heads: expected key/value heads that divide query heads, got 2 and 3",
        ),
        ({"q": torch.ones(1, 4, 1, 8, requires_grad=True)}, "expected no gradients"),
        ({"scale": 0.0}, "scale: expected a number"),
        ({"window": 0}, "window: expected a whole number of at least 1"),
        ({"softcap": -1.0}, "softcap: expected a positive number"),
        ({"v": torch.ones(1, 1, 1, 8)}, "k and v: expected equal shapes"),
        ({"v": torch.ones(1, 2, 1, 4)}, "v: expected [1, 2, tokens, 8] as in the cache"),
        ({"v": torch.ones(1, 2, 1, 8, requires_grad=True)}, "expected no gradients"),
        ({name: torch.ones(1, 2, 1, 8).bfloat16() for name in "qkv"}, "as in the cache, got"),
        ({"q": [1.0]}, "q: expected a torch.Tensor, got list"),
        ({"window": (3, 2)}, "window: expected (left, 0)"),
        ({"softcap": float("nan")}, "softcap: expected a positive number"),
        ({"sinks": [1.0]}, "sinks: expected a float32"),
        ({"sinks": torch.ones(3)}, "sinks: expected shape (4,)"),
    ],
)
def test_what_one_rank_refuses_all_refuse_and_no_cache_changes(
    change: dict[str, Any], text: str
) -> None:
    for rank, said in enumerate(CPContext.local(3).run(lambda cp: refusal(cp, change))):
        assert text in said
        assert ("rank 1 refuses" in said) == (rank != 1)


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        (torch.tensor([9, 2]), "lengths: expected [2] numbers from 0 to 8"),
        (torch.tensor([-1, 2]), "lengths: expected [2] numbers from 0 to 8"),
        (torch.tensor([1, 2, 3]), "lengths: expected [2] numbers"),
        (torch.tensor(3), "lengths: expected [2] numbers"),
        (torch.tensor([1.0, 2.0]), "lengths: expected an int32 or int64 tensor"),
        ([1, 2], "lengths: expected an int32 or int64 tensor"),
        (torch.tensor([2, 1]), "new tokens = "),  # rank 0 says [1, 2], whose sum is equal
    ],
)
def test_lengths_that_make_no_sense_are_refused_on_all_ranks(lengths: Any, text: str) -> None:
    def work(cp: CPContext) -> str:
        cache = KVCache(batch=2, num_kv_heads=1, head_dim=8, capacity=64, dtype=torch.float32)
        x = torch.ones(2, 1, 4, 8)
        mine = lengths if cp.rank == 1 else torch.tensor([1, 2])
        with pytest.raises(ValueError, match=r".") as caught:
            prefill(x, x, x, cache=cache, cp=cp, lengths=mine)
        assert not cache.num_used.any()
        assert not cache.next_position.any()
        return str(caught.value)

    assert all(text in said for said in CPContext.local(2).run(work))


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_what_lies_in_padding_does_not_reach_a_token(layout: str, first: int) -> None:
    """In the first prompt (first = 0) and in a chunk that follows; NaN in q, k and v."""

    def work(cp: CPContext, value: float) -> Tensor:
        cache = KVCache(batch=2, num_kv_heads=2, head_dim=16, capacity=64, dtype=torch.float32)
        q, k, v = (x[:, :, :24] for x in Case().inputs())
        options = {"cache": cache, "cp": cp}
        if first:
            prefill(*(shard(x, cp, dim=2) for x in (q, k, v)), **options)
        padding = torch.arange(24) >= LENGTHS[:, None]
        given = (x.masked_fill(padding[:, None, :, None], value) for x in (q, k, v))
        o = prefill(*(shard(x, cp, dim=2) for x in given), lengths=LENGTHS, **options)
        token = (x[:, :, :1] for x in (q, k, v))
        o = unshard(o, cp, dim=2).masked_fill(padding[:, None, :, None], 0.0)
        return torch.cat([o, decode(*token, **options)], dim=2)

    group = CPContext.local(2, layout=layout)
    with_nan, *_ = group.run(lambda cp: work(cp, float("nan")))
    with_zeros, *_ = group.run(lambda cp: work(cp, 0.0))
    assert torch.equal(with_nan, with_zeros)


def test_a_pair_is_the_window_that_it_says() -> None:
    def work(cp: CPContext, window: Any) -> Tensor:
        cache = KVCache(batch=2, num_kv_heads=2, head_dim=16, capacity=53, dtype=torch.float32)
        q, k, v = Case().inputs()
        part = [shard(x[:, :, :24], cp, dim=2) for x in (q, k, v)]
        o = unshard(prefill(*part, cache=cache, cp=cp, window=window), cp, dim=2)
        token = [x[:, :, 24:25] for x in (q, k, v)]
        return torch.cat([o, decode(*token, cache=cache, cp=cp, window=window)], dim=2)

    run = CPContext.local(2).run
    assert torch.equal(run(lambda cp: work(cp, (6, 0)))[0], run(lambda cp: work(cp, 7))[0])


def test_ranks_that_decode_different_things_are_named() -> None:
    def work(cp: CPContext) -> None:
        cache = KVCache(batch=1, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float32)
        x = torch.ones(1, 1, 1 + cp.rank, 8)
        decode(x, x, x, cache=cache, cp=cp)

    with pytest.raises(ValueError, match=r"k = \(1, 1, 1, 8\) on rank 0, \(1, 1, 2, 8\) on rank 1"):
        CPContext.local(2).run(work)


def test_a_full_cache_is_refused_on_all_ranks() -> None:
    def work(cp: CPContext) -> str:
        cache = KVCache(batch=1, num_kv_heads=1, head_dim=8, capacity=1, dtype=torch.float32)
        x = torch.ones(1, 1, 1, 8)
        for _ in range(2):
            decode(x, x, x, cache=cache, cp=cp)
        with pytest.raises(ValueError, match="at most 1 tokens") as caught:
            decode(x, x, x, cache=cache, cp=cp)
        return str(caught.value)

    texts = CPContext.local(2).run(work)
    assert "rank 0 refuses: cache: expected at most 1" in texts[1]


# Failures


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_after_a_failure_the_caches_are_as_before_and_the_call_can_be_made_again(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    q, k, v = Case().inputs()
    group, caches = CPContext.local(3), {}
    rows = slice(24, 36 if step == "prefill" else 25)

    def first(cp: CPContext) -> None:
        options = {"batch": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
        cache = caches[cp.rank] = KVCache(capacity=40, **options)
        prefill(*(shard(x[:, :, :24], cp, dim=2) for x in (q, k, v)), cache=cache, cp=cp)

    def second(cp: CPContext) -> Tensor:
        parts = [x[:, :, rows] for x in (q, k, v)]
        if step == "decode":
            return decode(*parts, cache=caches[cp.rank], cp=cp)
        parts = [shard(x, cp, dim=2) for x in parts]
        return unshard(prefill(*parts, cache=caches[cp.rank], cp=cp), cp, dim=2)

    def fails(*arguments: Any) -> Any:
        if threading.current_thread().name == "cp-rank-1":
            raise ZeroDivisionError("planted")
        return attend.attend(*arguments)

    group.run(first)
    before = [(c.num_used.clone(), c.positions.clone()) for _, c in sorted(caches.items())]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"nxd_cp.inference.{step}"], "attend", fails)
        with pytest.raises(ZeroDivisionError, match="planted"):
            group.run(second)
    for (_, cache), (num_used, positions) in zip(sorted(caches.items()), before, strict=True):
        assert torch.equal(cache.num_used, num_used)
        assert torch.equal(cache.positions, positions)
        assert cache.next_position.tolist() == [24, 24]
    assert_close(step, group.run(second)[0], truth(Case())[:, :, rows], FP32_OUTPUT)


def test_a_rank_that_fails_in_a_decode_says_that_its_group_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError("planted")

    def work(cp: CPContext) -> str:
        cache = KVCache(batch=1, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float32)
        x = torch.ones(1, 1, 1, 8)
        with pytest.raises(ZeroDivisionError):
            decode(x, x, x, cache=cache, cp=cp)
        with pytest.raises(RuntimeError) as caught:
            decode(x, x, x, cache=cache, cp=cp)
        return str(caught.value)

    monkeypatch.setattr(sys.modules["nxd_cp.inference.decode"], "attend", fails)
    for text in CPContext.local(2).run(work):
        assert "cannot be used any more" in text


def test_a_refusal_that_nobody_hears_is_still_the_error_that_is_raised() -> None:
    def work(cp: CPContext) -> None:
        if cp.rank == 1:
            cache = KVCache(batch=1, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float32)
            x = torch.ones(1, 1, 1, 8)
            decode(x, x, x, cache=cache, cp=cp, scale=0.0)

    with pytest.raises(ValueError, match="scale: expected a number"):
        CPContext.local(2, timeout_s=5).run(work)


# Planted faults


def test_parts_merged_without_their_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(o: Tensor, lse: Tensor, o_part: Tensor, lse_part: Tensor) -> None:
        o += (o_part - o) / 2

    monkeypatch.setattr(attend, "merge_", mean)
    case = Case(chunks=(24,))
    found = CPContext.local(2).run(lambda cp: generate(cp, case))[0]
    with pytest.raises(AssertionError, match="expected max"):
        assert_close(str(case), found, truth(case), FP32_OUTPUT)


def test_positions_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVCache.store

    def reversed_(self: KVCache, k: Tensor, v: Tensor, positions: Tensor) -> None:
        right(self, k, v, positions.flip(1))

    monkeypatch.setattr(KVCache, "store", reversed_)
    case = Case(window=7)
    found = CPContext.local(2).run(lambda cp: generate(cp, case))[0]
    with pytest.raises(AssertionError, match="expected max"):
        assert_close(str(case), found, truth(case), FP32_OUTPUT)


def test_tokens_that_one_rank_has_otherwise_are_caught_in_debug_mode() -> None:
    def work(cp: CPContext, differs: bool) -> None:
        x = torch.full((1, 1, 1, 16), 1.0 + (differs and cp.rank == 1))
        sizes = {"batch": 1, "num_kv_heads": 1, "head_dim": 16, "capacity": 4}
        decode(x, x, x, cache=KVCache(**sizes, dtype=torch.float32), cp=cp)

    group = CPContext.local(3)
    with debug():
        group.run(lambda cp: work(cp, False))
        with pytest.raises(ValueError, match=r"values = crc \w+ on rank 0 and 2, crc"):
            group.run(lambda cp: work(cp, True))
