"""Values of a wrong kind are refused by name: "no" is not False, True is no number, NaN no size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxd_cp import ring_attention
from nxd_cp.context import CPContext, LocalGroup
from nxd_cp.debugging import debug
from nxd_cp.inference import KVCache, decode, prefill
from nxd_cp.positions import position_ids, rope_tables, segment_ids
from nxd_cp.sharding import in_rank_order, shard, shard_batch
from nxd_cp.strategies import Strategy

X = torch.ones(1, 2, 4, 16)
CACHE = {"batch": 1, "num_kv_heads": 2, "head_dim": 16, "capacity": 8, "dtype": torch.float32}
NAN, INF = float("nan"), float("inf")


def alone(fn: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    return CPContext.local(1).run(lambda cp: fn(*tensors, cp=cp, **options))[0]


def local(**options: Any) -> Any:
    return CPContext.local(2, **options)


def in_debug(enabled: Any) -> None:
    with debug(enabled):
        pass


def one_token(fn: Callable[..., Any], **options: Any) -> Any:
    x = X[:, :, :1]
    with torch.no_grad():
        return alone(fn, x, x, x, cache=KVCache(**CACHE), **options)


FLAGS: list[tuple[Callable[..., Any], str]] = [
    (local, "check_ranks"),
    (lambda **options: ring_attention(X, X, X, **options), "causal"),
    (lambda **options: ring_attention(X, X, X, **options), "return_lse"),
    (lambda **options: alone(shard_batch, {"input_ids": X.long()}, **options), "pad"),
    (lambda **options: alone(in_rank_order, X, **options), "inverse"),
    (lambda **options: one_token(decode, **options), "return_lse"),
    (in_debug, "enabled"),
]


@pytest.mark.parametrize(("fn", "name"), FLAGS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, 1.0])
def test_a_flag_is_true_or_false(fn: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected True or False, got {value!r}"):
        fn(**{name: value})
    for right in (True, False):
        fn(**{name: right})


COUNTS: list[tuple[Callable[..., Any], str]] = [
    (lambda size: CPContext.local(size), "size"),
    *(
        (lambda name=name, **options: KVCache(**(CACHE | options)), name)
        for name in ("batch", "num_kv_heads", "head_dim", "capacity", "v_head_dim")
    ),
    (lambda seq_len: position_ids(seq_len), "seq_len"),
]


@pytest.mark.parametrize(("fn", "name"), COUNTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("value", [0, -1, True, 2.0, 2.5, "2", NAN])
def test_a_size_is_a_whole_number(fn: Callable[..., Any], name: str, value: Any) -> None:
    text = f"{name}: expected a whole number of at least 1, got {value!r}"
    with pytest.raises(ValueError, match=text):
        fn(**{name: value})
    fn(**{name: 2})


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, "5", True, None])
def test_a_timeout_is_a_positive_number_of_seconds(value: Any) -> None:
    with pytest.raises(ValueError, match=f"timeout_s: expected seconds, .*, got {value!r}"):
        CPContext.local(2, timeout_s=value)


@pytest.mark.parametrize(
    "order", [(0.0, 1.0), (False, True), (0, 0), 5, "01", (1,), {0, 1}, torch.tensor([0, 1])]
)
def test_a_ring_order_is_a_permutation_of_ranks(order: Any) -> None:
    with pytest.raises(ValueError, match=r"ring_order: expected a permutation of 0\.\.1"):
        CPContext.local(2, ring_order=order)


OTHERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rope_tables(torch.arange(4), 7), "head_dim: expected a positive even number, got 7"),
    (lambda: rope_tables(torch.arange(4), 8.0), "head_dim: expected .*, got 8.0"),
    *(
        (lambda theta=theta: rope_tables(torch.arange(4), 8, theta=theta), "theta: expected a pos")
        for theta in (0.0, -1.0, NAN, INF, "1", True)
    ),
    (lambda: segment_ids([0, 4]), "cu_seqlens: expected an int32 or int64 tensor, got list"),
    (lambda: segment_ids(torch.tensor([0.0, 4.0])), "cu_seqlens: expected .*, got torch.float32"),
    (lambda: segment_ids(torch.tensor([False, True])), "cu_seqlens: expected .*, got torch.bool"),
    (lambda: segment_ids(torch.tensor(4)), "cu_seqlens: expected .documents . 1. values from 0"),
    (lambda: KVCache(**(CACHE | {"dtype": torch.int32})), "dtype: expected float32, bfloat16 or"),
    (lambda: Strategy("auto", chip=2), "chip: expected a name, got 2"),
    (lambda: one_token(prefill, backend="nope"), "backend: expected one of torch"),
    *(
        (lambda window=window: ring_attention(X, X, X, window=window, causal=False), "window: exp")
        for window in [(2**70, 0), (None, 2**61), (True, 0), (1.0, 1), (NAN, 1), [1, 1]]
    ),
    (lambda: ring_attention(X, X, X, window=2**70), "window: expected at most 1152921504606846976"),
    *(
        (lambda x=x, pad=pad: padded(x, pad), "pad_value: expected a number that torch.* holds")
        for x, pad in [
            (torch.ones(3).long(), 0.5),
            (torch.ones(3).long(), NAN),
            (torch.ones(3).int(), 2**31),
            (torch.ones(3).to(torch.uint8), -100),
            (torch.ones(3).bool(), 2),
            (torch.ones(3), "0"),
        ]
    ),
]


def padded(x: torch.Tensor, pad_value: Any) -> Any:
    """The last rank alone has padding, but each refuses what would be wrong there."""

    def work(cp: CPContext) -> Any:
        try:
            return shard(x, cp, 0, pad_value=pad_value)
        except ValueError as error:
            return error

    found = CPContext.local(2, layout="contiguous").run(work)
    if isinstance(found[0], ValueError):
        assert str(found[1]) == str(found[0])
        raise found[0]
    return torch.cat(found)


@pytest.mark.parametrize(("call", "text"), OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_other_values_of_a_wrong_kind(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.bfloat16])
def test_a_value_that_the_dtype_holds_pads(dtype: torch.dtype) -> None:
    found = padded(torch.ones(3, dtype=dtype), 0)
    assert sorted(found.tolist()) == [0, 1, 1, 1]
    assert found.dtype == dtype


def test_a_backend_that_there_is_not_is_refused_in_a_later_chunk_too() -> None:
    def work(cp: CPContext) -> None:
        x, cache = X[:, :, :2], KVCache(**CACHE)
        prefill(x, x, x, cache=cache, cp=cp)
        with pytest.raises(ValueError, match="backend: expected one of torch"):
            prefill(x, x, x, cache=cache, cp=cp, backend="nope")

    CPContext.local(2).run(work)


def test_a_cost_rule_for_another_chip_on_one_rank_is_named() -> None:
    """The rule may choose another strategy for it, and the ranks would not meet."""

    contexts = [
        CPContext.local(2, strategy=Strategy("auto", chip=chip)).contexts
        for chip in ("trn2", "trn1")
    ]
    group = LocalGroup([contexts[0][0], contexts[1][1]], timeout_s=20)

    def work(cp: CPContext) -> str:
        with pytest.raises(ValueError, match="expected the same arguments") as caught:
            ring_attention(X, X, X, cp=cp)
        return str(caught.value)

    for text in group.run(work):
        assert "strategy = auto for trn2 on rank 0, auto for trn1 on rank 1" in text
