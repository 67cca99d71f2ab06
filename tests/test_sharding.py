"""Cutting and putting together: exact for every layout, ring size, dtype and dimension."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nxd_cp.context import CPContext
from nxd_cp.schedule import LAYOUTS, padded_len, seq_len_multiple, token_runs
from nxd_cp.sharding import IGNORE_INDEX, shard, shard_batch, unshard

LAYOUT_AND_SIZE = [(layout, size) for layout in LAYOUTS for size in (1, 2, 3, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def _batch(seq_len, num_rows=2):
    tokens = torch.arange(num_rows * seq_len).reshape(num_rows, seq_len)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize(("layout", "size"), LAYOUT_AND_SIZE)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_of_shard_is_the_same_tensor(layout, size, dim):
    shape = [2, 3, 5]
    shape[dim] = 3 * seq_len_multiple(layout, size)
    count = shape[0] * shape[1] * shape[2]
    for dtype in DTYPES:
        x = torch.arange(count).remainder(200).reshape(shape).to(dtype)
        parts = CPContext.local(size, layout=layout).run(
            lambda cp, x=x: unshard(shard(x, cp, dim), cp, dim)
        )
        for part in parts:
            assert part.dtype == dtype
            assert torch.equal(part, x)


@given(st.sampled_from(LAYOUTS), st.integers(1, 8), st.integers(1, 6))
def test_ranks_hold_each_token_once_in_schedule_order(layout, size, factor):
    seq_len = factor * seq_len_multiple(layout, size)
    held = []
    for rank in range(size):
        part = shard(torch.arange(seq_len)[None], _cp(layout, size, rank))[0].tolist()
        assert part == [i for run in token_runs(layout, size, rank, seq_len) for i in run]
        held += part
    assert sorted(held) == list(range(seq_len))


@pytest.mark.parametrize(("layout", "size"), LAYOUT_AND_SIZE)
def test_labels_are_the_true_successors_and_positions_are_global(layout, size):
    seq_len = 2 * seq_len_multiple(layout, size)
    for rank in range(size):
        part = shard_batch(_batch(seq_len), _cp(layout, size, rank))
        positions = part["position_ids"]
        assert torch.equal(part["input_ids"] % seq_len, positions)
        last = positions == seq_len - 1
        assert torch.equal(part["labels"][~last], part["input_ids"][~last] + 1)
        assert (part["labels"][last] == IGNORE_INDEX).all()


def test_labels_shifted_after_the_cut_are_caught():
    cp = _cp("contiguous", 2, 0)
    batch = _batch(8, num_rows=1)
    wrong = torch.cat([shard(batch["labels"], cp)[:, 1:], torch.tensor([[IGNORE_INDEX]])], dim=1)
    assert not torch.equal(wrong, shard_batch(batch, cp)["labels"])


def test_own_position_ids_are_kept():
    batch = {**_batch(8), "position_ids": torch.arange(8).remainder(3).expand(2, 8)}
    part = shard_batch(batch, _cp("zigzag", 2, 1))
    assert part["position_ids"][0].tolist() == [2, 0, 1, 2]


def test_the_batch_given_is_not_changed():
    batch = _batch(8)
    shard_batch(batch, _cp("zigzag", 2, 1))
    assert list(batch) == ["input_ids", "labels"]
    assert torch.equal(batch["labels"], _batch(8)["labels"])


def test_gradient_of_shard_goes_back_to_its_tokens():
    x = torch.zeros(1, 8, requires_grad=True)
    shard(x, _cp("zigzag", 2, 1)).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(("layout", "seq_len"), [("zigzag", 12), ("striped", 7), ("contiguous", 2)])
def test_lengths_that_do_not_divide_raise(layout, seq_len):
    with pytest.raises(ValueError, match=f"expected a positive multiple of .* got {seq_len}"):
        shard(torch.zeros(1, seq_len), _cp(layout, 4, 0))


def test_unshard_refuses_to_drop_a_gradient():
    x = torch.zeros(1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="needs no gradient"):
        CPContext.local(2).run(lambda cp: unshard(x, cp))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.ones(2, 8)}, "expected no attention_mask"),
        ({"lengths": torch.ones(2)}, r"expected lengths to start with \[2, 8\]"),
        ({"labels": torch.ones(2, 9)}, r"expected labels to start with \[2, 8\]"),
        ({"labels": torch.ones(2, 8).byte()}, "int64, which can hold -100, got torch.uint8"),
        ({"labels": torch.ones(2, 8)}, "int64, which can hold -100, got torch.float32"),
        ({"note": "text"}, "expected note to be a tensor, got str"),
    ],
)
def test_entries_that_cannot_be_cut_raise(extra, message):
    with pytest.raises(ValueError, match=message):
        shard_batch({**_batch(8), **extra}, _cp("zigzag", 2, 0))


@pytest.mark.parametrize("batch", [{}, {"input_ids": torch.zeros(8)}])
def test_batches_without_a_sequence_raise(batch):
    with pytest.raises(ValueError, match="expected"):
        shard_batch(batch, _cp("zigzag", 2, 0))


def _cp(layout, size, rank):
    """What cutting reads of a context; nothing is sent."""
    return SimpleNamespace(layout=layout, size=size, rank=rank)


# Lengths that do not divide, and documents


@given(st.sampled_from(LAYOUTS), st.integers(1, 8), st.integers(1, 60))
def test_padded_tokens_are_held_once_and_padding_comes_last(layout, size, seq_len):
    held = []
    for rank in range(size):
        part = shard(torch.arange(seq_len), _cp(layout, size, rank), 0, pad_value=-1).tolist()
        tokens = [token for token in part if token >= 0]
        assert part == [*tokens, *[-1] * (len(part) - len(tokens))]
        assert len(part) == padded_len(layout, size, seq_len) // size
        held += tokens
    assert sorted(held) == list(range(seq_len))


@pytest.mark.parametrize(("layout", "size"), LAYOUT_AND_SIZE)
def test_unshard_leaves_padding_out(layout, size):
    x = torch.arange(2 * 11.0).reshape(2, 11)
    for part in CPContext.local(size, layout=layout).run(
        lambda cp: unshard(shard(x, cp, pad_value=torch.nan), cp, seq_len=11)
    ):
        assert torch.equal(part, x)


@pytest.mark.parametrize(("layout", "size"), LAYOUT_AND_SIZE)
def test_a_padded_batch_has_no_labels_in_its_padding(layout, size):
    labels = []
    for rank in range(size):
        part = shard_batch(_batch(11, num_rows=1), _cp(layout, size, rank), pad=True)
        counted = part["labels"] != IGNORE_INDEX
        assert torch.equal(part["labels"][counted], part["input_ids"][counted] + 1)
        labels += part["labels"][counted].tolist()
    assert sorted(labels) == list(range(1, 11))


@pytest.mark.parametrize("by_id", [True, False])
def test_labels_and_positions_end_and_begin_with_their_document(by_id):
    cu_seqlens = torch.tensor([0, 3, 4, 9, 12])
    batch, packing = _batch(12, num_rows=1), {"cu_seqlens": cu_seqlens}
    if by_id:
        batch["segment_ids"] = torch.tensor([[5, 5, 5, 2, 9, 9, 9, 9, 9, 4, 4, 4]])
        packing = {}
    found = {}
    for rank in range(3):
        part = shard_batch(batch, _cp("zigzag", 3, rank), **packing)
        rows = (part["input_ids"], part["labels"], part["position_ids"])
        found |= {
            token: (label, position)
            for token, label, position in zip(*(x[0].tolist() for x in rows), strict=True)
        }
    assert [found[i][1] for i in range(12)] == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]
    lasts = {2, 3, 8, 11}
    assert [found[i][0] for i in range(12)] == [
        IGNORE_INDEX if i in lasts else i + 1 for i in range(12)
    ]


def test_two_packings_raise():
    batch = {**_batch(8), "segment_ids": torch.zeros(2, 8).long()}
    with pytest.raises(ValueError, match="at most one of them"):
        shard_batch(batch, _cp("zigzag", 2, 0), cu_seqlens=torch.tensor([0, 8]))


def test_a_batch_that_does_not_divide_says_how_to_pad():
    with pytest.raises(ValueError, match=r"pad=True.* and give ring_attention seq_len=11"):
        shard_batch(_batch(11), _cp("zigzag", 2, 0))
