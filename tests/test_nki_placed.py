"""Placed tensors over one another: who wrote last, against a plain table of every byte."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nki_sim import nisa, nl, run, sbuf

from nxd_cp.simulators.nki_api.freelist import FreeList
from nxd_cp.simulators.nki_api.region import Grid, Region

ROWS, WIDTH, ITEM = 32, 16, 4  # the memory that the tensors lie in, in elements
TENSORS = ((0, 16), (0, 8), (0, 8), (8, 8), (4, 8), (12, 2))  # (first element, elements)


def _program(seed):
    """60 steps (write or read, tensor, slice); half of them take the whole tensor."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        which = int(rng.integers(1, len(TENSORS)))
        part = slice(int(rng.integers(0, 7)), int(rng.integers(8, 17)), int(rng.integers(1, 4)))
        size = TENSORS[which][1]
        whole = slice(0, size) if rng.random() < 0.5 or part.start >= size else part
        yield rng.random() < 0.5, which, slice(whole.start, min(whole.stop, size), whole.step)


@pytest.mark.parametrize("seed", range(12))
def test_a_read_of_what_another_tensor_wrote_warns_and_no_other_read_does(seed):
    writers = np.zeros(WIDTH, int)  # every partition is the same
    seen = []

    def kernel():
        tiles = [
            nl.ndarray((ROWS, n), nl.float32, nl.sbuf, address=(0, ITEM * at)) for at, n in TENSORS
        ]
        nisa.memset(tiles[0], 1.0)
        for write, which, part in _program(seed):
            at, n = TENSORS[which]
            view, cells = tiles[which][:, part], writers[at : at + n][part]
            if write:
                nisa.memset(view, float(which))
                cells[...] = which
                continue
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                nisa.tensor_copy(sbuf(view.shape), view)
            seen.append((len(found) > 0, bool((cells != which).any())))
            for warning in found:
                assert "rule memory.overwritten" in str(warning.message)

    run(kernel)
    assert len({expected for _, expected in seen}) == 2
    assert [warned for warned, _ in seen] == [expected for _, expected in seen]


views = st.tuples(
    st.integers(0, 3), st.integers(1, 3), st.integers(0, 40), st.integers(1, 9), st.integers(1, 5)
)


@given(st.lists(views, max_size=10), st.sampled_from([1, 2, 4]))
@settings(max_examples=40)
def test_a_grid_agrees_with_a_table_of_bytes(marks, item):
    """Two free dims: runs of bytes, strided, on partitions."""
    size = 704  # bytes: the farthest view ends at 40 * 4 + 8 * 5 * 3 * 4 + 3 * 4 = 652
    grid, table = Grid(4, size, np.int32), np.zeros((4, size), np.int32)
    for number, (first, rows, byte, count, gap) in enumerate(marks, start=1):
        rows, byte = min(rows, 4 - first), byte * item
        strides = (1, 3 * gap * item, item)
        region = Region((first, byte, (rows, count, 3), strides, item))
        rect = np.zeros_like(table, dtype=bool)
        for i in range(count):
            start = byte + i * strides[1]
            rect[first : first + rows, start : start + 3 * item] = True
        assert set(np.unique(grid.at(region))) == set(np.unique(table[rect]))
        bounds = np.argwhere(rect)
        assert region.rect == (first, first + rows, bounds[0, 1], bounds[-1, 1] + 1)
        assert region.dense == (rect.sum() == rows * (bounds[-1, 1] + 1 - bounds[0, 1]))
        grid.at(region)[...] = number
        table[rect] = number
        np.testing.assert_array_equal(np.repeat(grid.cells, grid.granule, axis=1), table)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=20))
def test_reserving_takes_exactly_the_bytes_named(pieces):
    free, taken = FreeList(64), np.zeros(64, bool)
    for start, size in pieces:
        end = min(start + size, 64)
        free.reserve(start, end)
        taken[start:end] = True
        left = np.ones(64, bool)
        for low, high in free.free:
            assert low < high
            left[low:high] = False
        np.testing.assert_array_equal(left, taken)
        assert free.reserved == taken.sum()
