"""Masks as intervals: exactly the pairs of the mask, by query and by key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nxd_cp import reference
from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.backends.intervals import visible_keys, visible_queries
from nxd_cp.schedule import Bounded

CPU = torch.device("cpu")


def seen(mask: BlockMask, num_rows: int, num_keys: int) -> Tensor:
    """bool [B or 1, rows, keys], True where a key is seen."""
    inner = mask.mask if isinstance(mask, Documents) else mask
    visible = ~reference.hidden(inner, num_rows, num_keys, CPU)[None]
    if isinstance(mask, Documents):
        visible = visible & (mask.q_ids[:, :, None] == mask.k_ids[:, None, :])
    return visible


def check(mask: BlockMask, num_rows: int, num_keys: int) -> None:
    expected = seen(mask, num_rows, num_keys)
    first, stop = visible_keys(mask, num_rows, num_keys, CPU)
    key = torch.arange(num_keys)
    assert torch.equal((key >= first[..., None]) & (key < stop[..., None]), expected)
    first, stop = visible_queries(mask, num_rows, num_keys, CPU)
    row = torch.arange(num_rows)
    found = (row >= first[..., None]) & (row < stop[..., None])
    assert torch.equal(found.transpose(-1, -2), expected)


@pytest.mark.parametrize("mask", ["full", "causal", "strict", Bounded(-3, 2), Bounded(30, 40)])
def test_bands_are_intervals(mask: BlockMask) -> None:
    check(mask, 9, 9)


@settings(max_examples=200)
@given(st.data())
def test_any_band_and_packing_of_any_rectangle(data: st.DataObject) -> None:
    num_rows, num_keys = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    low = data.draw(st.integers(-14, 14))
    band = Bounded(low, low + data.draw(st.integers(-1, 20)))
    sides = [
        torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))).sort()[0]
        for n in (num_rows, num_keys)
    ]
    check(band, num_rows, num_keys)
    check(Documents(band, *(ids[None] for ids in sides)), num_rows, num_keys)


def test_documents_in_falling_order_and_several_rows_of_a_batch() -> None:
    q_ids = torch.tensor([[5, 5, 1, 0], [2, 2, 2, 2]])
    k_ids = torch.tensor([[9, 5, 1, 1], [0, 2, 2, 1]])
    check(Documents("causal", q_ids, k_ids), 4, 4)


def test_a_document_that_comes_back_is_refused() -> None:
    ids = torch.tensor([[0, 1, 0]])
    with pytest.raises(ValueError, match="expected each document in one piece"):
        visible_keys(Documents("causal", ids, ids), 3, 3, CPU)


def test_an_interval_that_is_one_off_is_caught() -> None:
    expected = seen(Bounded(-3, 2), 9, 9)
    first, stop = visible_keys(Bounded(-4, 2), 9, 9, CPU)
    key = torch.arange(9)
    assert not torch.equal((key >= first[..., None]) & (key < stop[..., None]), expected)
