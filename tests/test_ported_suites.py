"""Cases of other projects' test suites (shapes, masks, counts; tolerances no looser than theirs).

Lengths are divided by 4 to 16 where a CPU would take too long; the number is with each table. fp32
is held to 1e-5 (outputs) and 1e-4 (gradients) absolute against fp64, 16-bit to 1.5 times the
relative RMS error of PyTorch's one-device attention on the same data, plus a quarter of a rounding
step.

Sources: PyTorch 2.13 test/distributed/tensor/test_attention.py;
lucidrains/ring-attention-pytorch@373f75b assert_attn.py, assert_zig_zag.py and assert_tree_attn.py;
NVIDIA/TransformerEngine@d0067d0 tests/pytorch/attention/test_attention_with_cp.py, test_cp_utils.py
and tests/jax/test_distributed_fused_attn.py;
zhuzilin/ring-flash-attention 0.1.7 test/; aws-neuron/nki-library@d2ad3a5 test/ (ring attention);
aws-neuron/neuronx-distributed@fbac349 test/unit_test (test_cp_batch); deepspeedai/DeepSpeed@edaa722
tests/unit/ulysses_alst; feifeibear/long-context-attention@56118e0 test/test_hybrid_attn.py; and bug
reports, named at each test.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budgets import error
from cases import Case, all_ranks_locally, check_fp32, inputs, join_all, one_device, one_rank, truth
from ranks import RankGroup
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from nxd_cp import (
    CPContext,
    debug,
    position_ids,
    reference,
    ring_attention,
    shard,
    shard_batch,
    token_mean_loss,
    unshard,
)
from nxd_cp.inference import KVCache, decode
from nxd_cp.schedule import LAYOUTS, make_plan, token_runs
from nxd_cp.strategies import Strategy

RMS_FACTOR = 1.5


def check_sixteen_bit(case: Case) -> None:
    found = all_ranks_locally(case)
    for name, x, y, baseline in zip(case.names, found, truth(case), one_device(case), strict=True):
        got, allowed = error(x, y).relative_rms, error(baseline, y).relative_rms
        bound = RMS_FACTOR * allowed + torch.finfo(case.dtype).eps / 4
        assert got <= bound, f"{case} {name}: {got:.2e}, one device {allowed:.2e}"


# PyTorch: test_ring_attention_sdpa, 64 tokens per rank


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
def test_pytorch_ring_attention_sdpa(size: int, layout: str, causal: bool) -> None:
    shape = {"size": size, "layout": layout, "causal": causal, "B": 8, "S": 64 * size, "D": 32}
    check_fp32(case := Case(Hq=8, Hkv=8, **shape), all_ranks_locally(case))
    check_sixteen_bit(Case(Hq=8, Hkv=8, dtype=torch.bfloat16, **shape))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_pytorch_number_of_exchanges(size: int) -> None:
    def count(cp: CPContext) -> tuple[int, int]:
        x = torch.randn(1, 1, 4, 8, requires_grad=True)
        o = ring_attention(x, x, x, cp=cp, causal=False)
        forward = cp.transport.counters.ring_messages
        o.sum().backward()
        return forward, cp.transport.counters.ring_messages

    assert CPContext.local(size).run(count) == [(size - 1, 3 * size - 2)] * size


@pytest.mark.parametrize("size", [2, 4])
def test_pytorch_what_each_step_computes(size: int) -> None:
    """Contiguous: own block causal, earlier owners full, later owners nothing."""
    plan = make_plan("contiguous", size, 8 * size)
    for rank, steps in enumerate(plan.steps):
        seen = {step.owner: {tile.mask for tile in step.tiles} for step in steps}
        assert seen[rank] == {"causal"}
        for owner in set(range(size)) - {rank}:
            assert seen.get(owner, set()) == ({"full"} if owner < rank else set())
        balanced = make_plan("zigzag", size, 8 * size).steps[rank]
        assert [step.num_pairs for step in balanced[1:]] == [32] * (size - 1), "half of 8 x 8"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seq_len", [48, 96, 37, 5])
def test_pytorch_load_balancer_round_trip(layout: str, seq_len: int) -> None:
    x = torch.arange(2 * seq_len).view(2, seq_len)

    def there_and_back(cp: CPContext) -> Tensor:
        return unshard(shard(x, cp, pad_value=-1), cp, seq_len=seq_len)

    for whole in CPContext.local(4, layout=layout).run(there_and_back):
        assert torch.equal(whole, x)


# ring-attention-pytorch: assert_attn, assert_zig_zag (outputs 1e-6) and assert_tree_attn

RING_ATTENTION_PYTORCH = [
    {"layout": "contiguous", "S": 31},
    {"layout": "contiguous", "S": 31, "causal": False},
    {"layout": "striped", "S": 64},
    {"layout": "zigzag", "S": 31, "Hkv": 4, "D": 16},
]


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("change", RING_ATTENTION_PYTORCH, ids=str)
def test_ring_attention_pytorch(change: dict[str, Any], size: int) -> None:
    case = Case(**{"size": size, "B": 2, "Hq": 8, "Hkv": 8, "D": 8} | change)
    found = all_ranks_locally(case)
    check_fp32(case, found)
    assert error(found[0], truth(case)[0]).max_abs <= 1e-6


@pytest.mark.parametrize("size", [4, 8])
def test_ring_attention_pytorch_tree_decoding(size: int) -> None:
    """31 keys over the ranks, one query that sees them all."""
    q, k, v, _ = inputs(Case(S=31, Hq=8, Hkv=8, D=64))

    def last(cp: CPContext) -> Tensor:
        cache = KVCache(batch=1, num_kv_heads=8, head_dim=64, capacity=31, dtype=torch.float32)
        decode(*(x[:, :, :30] for x in (q, k, v)), cache=cache, cp=cp)
        return decode(*(x[:, :, 30:] for x in (q, k, v)), cache=cache, cp=cp)

    exact, _ = reference.attention(
        q[:, :, 30:].double(), k.double(), v.double(), mask="full", scale=64**-0.5
    )
    for found in CPContext.local(size).run(last):
        assert error(found, exact).max_abs <= 1e-6


# TransformerEngine: reorder tests, test_cp_utils, and test_attention_with_cp (lengths / 16)


def test_transformer_engine_reorders() -> None:
    order = [list(token_runs("zigzag", 2, rank, 8)) for rank in range(2)]
    assert [[*a, *b] for a, b in order] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    order = [list(token_runs("zigzag", 4, rank, 16)) for rank in range(4)]
    assert [[*a, *b] for a, b in order] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    order = [list(token_runs("zigzag", 8, rank, 16)) for rank in range(8)]
    assert [[*a, *b] for a, b in order] == [[rank, 15 - rank] for rank in range(8)]
    assert [list(token_runs("striped", 8, rank, 16)[0]) for rank in range(8)] == [
        [rank, rank + 8] for rank in range(8)
    ]
    assert [list(token_runs("striped", 4, rank, 8)[0]) for rank in range(4)] == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]


def test_transformer_engine_batch_on_this_rank() -> None:
    tokens, by_row = torch.arange(1, 9)[None], torch.arange(16).view(2, 8)
    first, second = CPContext.local(2).contexts
    for cp, mine in ((first, [0, 1, 6, 7]), (second, [2, 3, 4, 5])):
        part = shard_batch({"input_ids": tokens}, cp)
        assert part["input_ids"].tolist() == [[at + 1 for at in mine]]
        assert part["position_ids"].tolist() == [mine]
        assert shard(10 * tokens, cp).tolist() == [[10 * (at + 1) for at in mine]]
        assert shard(by_row, cp).tolist() == [mine, [8 + at for at in mine]]
        assert shard(by_row.T, cp, dim=0).tolist() == [[at, 8 + at] for at in mine]
        with pytest.raises(ValueError, match=r"multiple of 4 .*got 7"):
            shard(tokens[:, :7], cp)


@pytest.mark.parametrize("ends", [[0, 8, 16, 24], [0, 6, 18, 24, 36], [0, 8, 20, 28]], ids=str)
def test_transformer_engine_positions_of_padded_documents(ends: list[int]) -> None:
    """As of its padded documents; and of the documents themselves, which need no padding here."""
    expected = [at for first, stop in pairwise(ends) for at in range(stop - first)]
    bounds = torch.tensor(ends)
    assert position_ids(ends[-1], cu_seqlens=bounds).tolist() == expected
    by_rank = [position_ids(ends[-1], cp, cu_seqlens=bounds) for cp in CPContext.local(2).contexts]
    order = [
        at for rank in range(2) for run in token_runs("zigzag", 2, rank, ends[-1]) for at in run
    ]
    assert torch.cat(by_rank).tolist() == [expected[at] for at in order]


TRANSFORMER_ENGINE = [
    {"Hkv": 12},
    {"Hkv": 2},
    {"Hkv": 12, "causal": False},
    {"Hkv": 2, "window": (32, 0)},
    {"Hkv": 12, "D": 192, "Dv": 128},
]


@pytest.mark.parametrize("change", TRANSFORMER_ENGINE, ids=str)
def test_transformer_engine_attention_with_cp(change: dict[str, Any]) -> None:
    shape = {"size": 2, "B": 2, "S": 256, "Hq": 12, "D": 128} | change
    check_fp32(case := Case(**shape), all_ranks_locally(case))
    check_sixteen_bit(Case(dtype=torch.bfloat16, **shape))


# ring-flash-attention (lengths / 8, documents / 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seq_len", [477, 478])
def test_ring_flash_attention_dense(layout: str, seq_len: int) -> None:
    check_sixteen_bit(Case(layout, size=2, S=seq_len, Hq=5, Hkv=5, D=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("lengths", "size"), [((30, 282, 746), 4), ((7, 7, 2), 8)], ids=["long", "of 7"]
)
def test_ring_flash_attention_varlen(layout: str, lengths: tuple[int, ...], size: int) -> None:
    case = Case(layout, size=size, S=sum(lengths), Hq=5, Hkv=5, D=32, lengths=lengths)
    check_fp32(case, all_ranks_locally(case))


# nki-library's ring attention (lengths / 8)

NKI_LIBRARY = [
    {"S": 1024, "size": 2, "D": 128},
    {"S": 256, "size": 4, "D": 128},
    {"S": 1280, "size": 4, "D": 64},
    {"S": 288, "size": 4, "D": 128},
    {"S": 520, "size": 4, "D": 128},
    {"S": 64, "size": 8, "D": 16},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", NKI_LIBRARY, ids=str)
def test_nki_library_forward_and_backward(layout: str, change: dict[str, Any]) -> None:
    case = Case(layout=layout, Hq=2, Hkv=2, dtype=torch.bfloat16, **change)
    o, *grads = all_ranks_locally(case)
    exact, *exact_grads = truth(case)
    torch.testing.assert_close(o.double(), exact, atol=1e-3, rtol=2**-8)
    for x, y in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nki_library_packed(layout: str) -> None:
    ends = [0, 128, 512, 768, 896, 1280, 1536, 1920, 2048]
    lengths = tuple(b - a for a, b in pairwise(ends))
    case = Case(layout, size=4, S=2048, Hq=1, Hkv=1, D=32, lengths=lengths)
    check_fp32(case, all_ranks_locally(case))


def rings_beside_each_other(group: dist.ProcessGroup, case: Case) -> tuple[Tensor, ...]:
    """Group ranks (0, 2) and (1, 3) each form a ring, for heads of their own."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("cp", "tp"))
    cp, heads = CPContext.from_mesh(mesh, "cp", layout=case.layout), mesh.get_local_rank("tp")
    *leaves, do = (shard(x, cp, dim=2).chunk(2, dim=1)[heads] for x in inputs(case))
    leaves = [x.clone().requires_grad_() for x in leaves]
    o = ring_attention(*leaves, cp=cp)
    o.backward(do)
    return (o.detach(), *(x.grad for x in leaves))


def test_nki_library_two_rings_beside_each_other(ranks: RankGroup) -> None:
    """Heads over tensor-parallel ranks, the sequence over the ranks of each ring."""
    case = Case(size=2, layout="striped", Hq=6, Hkv=6, S=576, D=128)
    found = ranks.run(rings_beside_each_other, case)
    by_rank = [[torch.cat(pair, 1) for pair in zip(*found[i : i + 2], strict=True)] for i in (0, 2)]
    check_fp32(case, join_all([tuple(one) for one in by_rank], case))


# NxD: test_cp_batch


def test_nxd_batch_is_sliced_and_its_labels_shifted() -> None:
    tokens = torch.arange(16).view(2, 8)

    def work(cp: CPContext) -> list[list[list[int]]]:
        part = shard_batch({"input_ids": tokens, "labels": tokens}, cp)
        return [part[name].tolist() for name in ("input_ids", "labels")]

    assert CPContext.local(2, layout="contiguous").run(work) == [
        [[[0, 1, 2, 3], [8, 9, 10, 11]], [[1, 2, 3, 4], [9, 10, 11, 12]]],
        [[[4, 5, 6, 7], [12, 13, 14, 15]], [[5, 6, 7, -100], [13, 14, 15, -100]]],
    ]


# DeepSpeed and Megatron-LM #7452: ranks with different numbers of ignored labels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepspeed_loss_with_uneven_ignored_labels(layout: str) -> None:
    logits = torch.randn(1, 32, 11, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(32)[None] % 11
    labels[:, :13] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def share(cp: CPContext) -> Tensor:
        part, mine = shard(logits, cp), shard(labels, cp)
        each = F.cross_entropy(part.flatten(0, 1), mine.flatten(), reduction="none")
        return token_mean_loss(each, mine, cp)

    total = sum(CPContext.local(4, layout=layout).run(share))
    assert abs(float(total - expected)) <= 1e-6


# long-context-attention: the hybrid (lengths / 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_long_context_attention_hybrid(layout: str, ways: int) -> None:
    strategy = Strategy("heads", ways=ways)
    case = Case(layout, size=4, S=256, Hq=32, Hkv=32, D=32, strategy=strategy)
    check_fp32(case, all_ranks_locally(case))


# Bug reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["ring", "gather", "heads"])
def test_a_received_block_is_never_stale(strategy: str, dtype: torch.dtype) -> None:
    """diffusers #14274: in debug mode used buffers hold NaN; gradients are the same without."""
    case = Case(size=4, S=96, dtype=dtype, strategy=strategy)
    with debug():
        poisoned = all_ranks_locally(case)
    for x, y in zip(poisoned, all_ranks_locally(case), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("fill", [1e4, float("nan")])
def test_the_tail_of_padding_changes_nothing(fill: float) -> None:
    """TransformerEngine #3331: 698 tokens padded to 704 on 4 ranks."""
    case = Case(size=4, S=698, Hq=1, Hkv=1, D=16)
    q, k, v, do = (F.pad(x, (0, 0, 0, 6), value=fill) for x in inputs(case))

    def work(cp: CPContext) -> list[Tensor]:
        leaves = [shard(x, cp, dim=2).requires_grad_() for x in (q, k, v)]
        o = ring_attention(*leaves, cp=cp, seq_len=698)
        o.backward(shard(do, cp, dim=2))
        return [unshard(x.detach(), cp, dim=2) for x in (o, *(x.grad for x in leaves))]

    check_fp32(case, tuple(x[:, :, :698] for x in CPContext.local(4).run(work)[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_of_a_document_of_seven_is_lost(layout: str) -> None:
    """TransformerEngine #1930: lengths that no rank count divides."""
    lengths = (7, 7, 7, 7, 4)
    case = Case(layout, size=4, S=32, lengths=lengths, by_id=True)
    check_fp32(case, all_ranks_locally(case))


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_rows_that_see_nothing_of_a_rank_stay_finite(layout: str) -> None:
    """nki-library: small sequences on many ranks gave infinite gradients."""
    case = Case(layout, size=8, S=16, Hq=2, Hkv=1)
    found = all_ranks_locally(case)
    assert all(x.isfinite().all() for x in found)
    check_fp32(case, found)


def test_large_logits_do_not_overflow_the_merge() -> None:
    """EasyContext #14: scores of 3e4 and more."""
    q, k, v, _ = (x.double() for x in inputs(Case(S=32)))
    large = 2e4 * q

    def work(cp: CPContext) -> Tensor:
        part = (shard(x.float(), cp, dim=2) for x in (large, k, v))
        return unshard(ring_attention(*part, cp=cp), cp, dim=2)

    found = CPContext.local(4).run(work)[0]
    one = F.scaled_dot_product_attention(
        large.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
    )
    assert found.isfinite().all()
    torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)


def test_the_scale_is_used_once_forward_and_backward() -> None:
    """nki-library's forward ignores the scale where causal, its backward does not."""
    case = Case(size=2, S=32)
    scaled = [2.0 * x if i == 0 else x for i, x in enumerate(inputs(case))]

    def work(cp: CPContext, tensors: list[Tensor], scale: float) -> list[Tensor]:
        *qkv, do = (shard(x, cp, dim=2) for x in tensors)
        leaves = [x.requires_grad_() for x in qkv]
        o = ring_attention(*leaves, cp=cp, scale=scale)
        o.backward(do)
        return [o.detach(), *(x.grad for x in leaves)]

    group = CPContext.local(2)
    plain = group.run(lambda cp: work(cp, list(inputs(case)), 0.5))
    other = group.run(lambda cp: work(cp, scaled, 0.25))
    for (o, dq, dk, dv), (o2, dq2, dk2, dv2) in zip(plain, other, strict=True):
        for x, y in ((o, o2), (dq, 2.0 * dq2), (dk, dk2), (dv, dv2)):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_beyond_the_window_nothing_is_sent() -> None:
    """ring-flash-attention #35, Megatron-LM #5597."""
    case = Case("contiguous", size=8, S=256, window=20)

    def count(cp: CPContext) -> int:
        one_rank(cp, case)
        return cp.transport.counters.messages["kv"]

    sent = CPContext.local(8, layout="contiguous").run(count)
    assert sent == [2] * 7 + [0], "one hop forward and one in the backward, none from the last"
