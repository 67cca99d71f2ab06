"""SBUF and PSUM are finite, shared, and full of NaN until written."""

import gc
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nki_sim import GENERATIONS, load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError, chips
from nxd_cp.simulators.nki_api.freelist import FreeList
from nxd_cp.simulators.nki_api.initmap import FRESH, OTHER, InitMap
from nxd_cp.simulators.nki_api.region import Region


@pytest.mark.parametrize("generation", GENERATIONS)
def test_sbuf_holds_what_the_chip_has_and_not_a_byte_more(generation):
    usable = chips.CHIPS[generation].sbuf_usable_bytes

    def fits():
        store(nl.zeros((128, usable), dtype=nl.uint8)[:, 0:4])

    def overflows():
        first = nl.ndarray((128, usable), dtype=nl.uint8)
        second = nl.ndarray((128, 1), dtype=nl.uint8)  # bad
        for tile in (first, second, first):
            nisa.memset(tile, 0)

    run(fits, generation=generation)
    text = rejects("memory.capacity", overflows, generation=generation)
    assert f"{usable} of {usable} in use by 1 live tensors" in text


def test_psum_has_eight_banks_and_small_tiles_never_cross_one():
    def eight():
        banks = [psum((128, 512)) for _ in range(8)]
        return banks[0].shape[0]

    def nine():
        banks = [psum((128, 512)) for _ in range(8)]
        banks.append(nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.psum))  # bad
        for bank in banks + banks:
            nisa.memset(bank, 0)

    assert run(eight) == 128
    rejects("memory.capacity", nine)


def test_tensors_that_a_list_keeps_after_their_last_use_take_no_room():
    def kernel(x):
        kept, total = [], sbuf(x.shape)
        nisa.memset(total, -9)
        for _ in range(8):
            kept.append(load(x))
            nisa.tensor_tensor(total, total, kept[-1], nl.maximum)
        return store(total)

    def all_at_once(x):
        kept, total = [load(x) for _ in range(8)], sbuf(x.shape)  # too many
        nisa.memset(total, 0)
        for tile in kept:
            nisa.tensor_tensor(total, total, tile, nl.add)
        return store(total)

    x = normal(128, 12288)  # 48 KiB per partition, of 176
    np.testing.assert_array_equal(run(kernel, x, generation="gen2"), x)
    with pytest.raises(NkiValidationError, match=r"rule memory\.capacity "):
        run(all_at_once, x, generation="gen2")


def test_tensors_of_half_the_partitions_lie_beside_each_other():
    def kernel(partitions, count):
        tiles = [nl.ndarray((partitions, 65536), dtype=nl.bfloat16) for _ in range(count)]
        for tile in tiles + tiles:
            nisa.memset(tile, 0)

    for partitions, fits in ((128, 1), (65, 1), (64, 2), (32, 4)):
        run(kernel, partitions, fits)
        with pytest.raises(NkiValidationError, match=r"rule memory\.capacity "):
            run(kernel, partitions, 2 * fits)


def test_references_to_many_times_the_memory_fail_at_once():
    def kernel():
        kept = []
        for _ in range(1000):
            kept.append(nl.ndarray((128, 12288), dtype=nl.float32))  # bad

    rejects("memory.capacity", kernel)


def test_a_tensor_gives_its_bytes_back_when_no_name_refers_to_it():
    def loop(x):
        for _ in range(100):
            tile = load(x)
        return store(tile)

    gc.disable()
    try:
        x = normal(128, 16384)
        assert (run(loop, x, generation="gen2") == x).all()
    finally:
        gc.enable()


def test_a_view_keeps_its_tensor_alive():
    def kernel(x):
        view = load(x)[:, 0:4]
        nl.zeros((128, 128), dtype=nl.float32)
        return store(view)

    x = normal(128, 128)
    assert (run(kernel, x) == x[:, 0:4]).all()


def test_reading_fresh_memory_names_the_place_of_allocation():
    def kernel():
        tile = nl.ndarray((128, 8), dtype=nl.float32)
        out = sbuf((128, 8))
        nisa.tensor_copy(dst=out, src=tile)  # bad

    text = rejects("memory.uninitialised", kernel)
    assert "allocated at" in text
    assert "test_nki_memory.py" in text


def test_reading_memory_written_only_in_part_is_caught():
    def kernel(x):
        tile, out = sbuf((128, 8)), sbuf((128, 8))
        nisa.dma_copy(dst=tile[:, 0:7], src=x[:, 0:7])
        nisa.tensor_copy(dst=out[:, 0:7], src=tile[:, 0:7])
        nisa.activation(dst=out, op=nl.exp, data=tile)  # bad

    rejects("memory.uninitialised", kernel, normal(128, 8))


def test_memory_written_in_pieces_counts_as_written():
    def kernel(x):
        tile = sbuf((128, 8))
        for i in range(4):
            nisa.dma_copy(dst=tile[:, 2 * i : 2 * i + 2], src=x[:, 2 * i : 2 * i + 2])
        other = sbuf((128, 8))
        for i in range(2):
            nisa.tensor_copy(dst=other[:, i::2], src=tile[:, i::2])
        out = sbuf((128, 8))
        nisa.tensor_copy(dst=out, src=other)
        return store(out)

    x = normal(128, 8)
    assert (run(kernel, x) == x).all()


def test_a_dma_may_move_unwritten_padding_as_nan_with_a_warning():
    def kernel(x):
        tile = sbuf((128, 8))
        nisa.dma_copy(dst=tile[:, 0:4], src=x)
        return store(tile)

    x = normal(128, 4)
    with pytest.warns(NkiSimulatorWarning, match="dma_copy.uninitialised"):
        got = run(kernel, x)
    assert (got[:, :4] == x).all()
    assert np.isnan(got[:, 4:]).all()


def test_an_output_with_unwritten_elements_is_reported():
    def kernel(x):
        out = nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[0:64, :], src=x[0:64, :])
        return out

    with pytest.warns(NkiSimulatorWarning, match="kernel.unwritten_output"):
        got = run(kernel, normal(128, 8))
    assert np.isnan(got[64:]).all()


def test_tensors_placed_at_one_address_share_their_bytes():
    def kernel(x):
        a = nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.sbuf, address=(0, 1024))
        b = nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.sbuf, address=(0, 1040))
        nisa.dma_copy(dst=a, src=x)
        out = sbuf((128, 4))
        nisa.tensor_copy(dst=out, src=b)
        return store(out)

    x = normal(128, 8)
    assert (run(kernel, x) == x[:, 4:]).all()


def test_an_address_used_again_starts_unwritten():
    def kernel(x):
        first = nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.sbuf, address=(0, 0))
        nisa.dma_copy(dst=first, src=x)
        del first
        again = nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.sbuf, address=(0, 0))
        nisa.tensor_copy(dst=sbuf((128, 8)), src=again)  # bad

    rejects("memory.uninitialised", kernel, normal(128, 8))


@pytest.mark.parametrize(
    ("buffer", "address"),
    [(nl.sbuf, (0, 2)), (nl.sbuf, (0, 10**7)), (nl.sbuf, (64, 0)), (nl.psum, (0, 1024))],
)
def test_addresses_outside_or_unaligned_are_rejected(buffer, address):
    def kernel():
        nl.ndarray((128, 8), dtype=nl.float32, buffer=buffer, address=address)  # bad

    rejects("memory.address", kernel)


def test_a_16_bit_tensor_may_lie_at_an_even_byte_but_warns():
    def kernel(x):
        tile = nl.ndarray((128, 3), dtype=nl.bfloat16, buffer=nl.sbuf, address=(0, 2))
        beside = nl.ndarray((128, 1), dtype=nl.bfloat16, buffer=nl.sbuf, address=(0, 8))
        nisa.dma_copy(dst=beside, src=x[:, 3:])
        nisa.dma_copy(dst=tile[:, 0:1], src=x[:, 0:1])
        nisa.dma_copy(dst=tile[:, 1:3], src=x[:, 1:3])
        return store(tile)

    x = normal(128, 4, dtype=ml_dtypes.bfloat16)
    with pytest.warns(NkiSimulatorWarning, match="memory.alignment"):
        np.testing.assert_array_equal(run(kernel, x), x[:, :3])


def test_half_of_an_even_placed_tensor_is_still_unwritten():
    def kernel(x):
        tile = nl.ndarray((128, 4), dtype=nl.bfloat16, buffer=nl.sbuf, address=(0, 2))
        nisa.dma_copy(dst=tile[:, 0:3:2], src=x[:, 0:2])
        nisa.activation(dst=sbuf((128, 2)), op=nl.exp, data=tile[:, 0:2])  # bad

    with pytest.warns(NkiSimulatorWarning, match="memory.alignment"):
        rejects("memory.uninitialised", kernel, normal(128, 4, dtype=ml_dtypes.bfloat16))


def padded(x, columns):
    tile = sbuf((128, 8))
    nisa.dma_copy(dst=tile[:, 0:columns], src=x[:, 0:columns])
    return tile


def test_a_tile_copied_with_its_padding_warns_and_the_padding_stays_unwritten():
    def good(x):
        copy = sbuf((128, 8), nl.bfloat16)
        nisa.tensor_copy(dst=copy, src=padded(x, 5))
        return store(copy[:, 0:5])

    def bad(x):
        copy = sbuf((128, 8))
        nisa.tensor_copy(dst=copy, src=padded(x, 5))
        nisa.activation(dst=sbuf((128, 6)), op=nl.exp, data=copy[:, 0:6])  # bad

    x = normal(128, 8)
    with pytest.warns(NkiSimulatorWarning, match="tensor_copy.uninitialised"):
        np.testing.assert_array_equal(run(good, x), x[:, :5].astype(ml_dtypes.bfloat16))
    with pytest.warns(NkiSimulatorWarning, match="tensor_copy.uninitialised"):
        rejects("memory.uninitialised", bad, x)


def test_a_copy_of_memory_that_nobody_wrote_is_rejected():
    def kernel():
        nisa.tensor_copy(dst=sbuf((128, 8)), src=sbuf((128, 8)))  # bad

    rejects("memory.uninitialised", kernel)


def test_more_than_128_partitions_are_rejected():
    def kernel():
        nl.ndarray((256, 8), dtype=nl.float32)  # bad

    rejects("memory.partitions", kernel)


@pytest.mark.parametrize("shape", [(128,), (128, 0), (128, 8.0), (1, 1, 1, 1, 1, 1)])
def test_illegal_shapes_are_rejected(shape):
    def kernel():
        nl.ndarray(shape, dtype=nl.float32)  # bad

    rejects("ndarray.shape", kernel)


def test_a_single_element_on_chip_has_two_dims():
    """As in the documented examples of register_load and register_store, with a warning."""

    def kernel():
        bound, result = nl.ones([1], dtype=nl.int32), nl.ndarray([1], dtype=nl.int32)
        register = nisa.register_alloc()
        nisa.register_load(register, bound)
        nisa.register_store(result, register)
        return bound.shape, store(result)

    with pytest.warns(NkiSimulatorWarning, match=r"rule ndarray\.single "):
        shape, found = run(kernel)
    assert (shape, found.tolist()) == ((1, 1), [[1]])


def test_a_buffer_given_as_text_is_rejected():
    def kernel():
        nl.ndarray((128, 8), dtype=nl.float32, buffer="sbuf")  # bad

    rejects("ndarray.buffer", kernel)


@given(st.lists(st.tuples(st.integers(1, 600), st.booleans()), max_size=60))
def test_automatic_blocks_never_overlap_or_cross_a_bank(requests):
    free, live = FreeList(4096, 512), []
    for size, drop in requests:
        at = free.take(size)
        if at is not None:
            assert 0 <= at <= 4096 - size
            assert size > 512 or at // 512 == (at + size - 1) // 512
            assert all(at + size <= a or a + s <= at for a, s in live)
            live.append((at, size))
        if drop and live:
            free.give(*live.pop(0))
    for block in live:
        free.give(*block)
    assert free.free == [(0, 4096)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(1, 4),
            st.integers(0, 7),
            st.integers(1, 8),
            st.integers(1, 3),
        ),
        max_size=12,
    )
)
def test_the_write_map_agrees_with_a_plain_bitmap(writes):
    plain = np.zeros((4, 8), bool)
    init = InitMap(4, 32)
    for p, num_p, f, num_f, step in writes:
        num_p, num_f = min(num_p, 4 - p), min(num_f, (8 - f - 1) // step + 1)
        span = (num_f - 1) * step + 1
        view = Region((p, 4 * f, (num_p, num_f), (1, 4 * step), 4))
        cells = plain[p : p + num_p, f : f + span : step]
        assert init.fresh(view) == (FRESH in init.codes(view)) == (not cells.all())
        if init.uniform not in (FRESH, OTHER):
            written = init.written(view).reshape(num_p, num_f, -1)
            np.testing.assert_array_equal(written.all(axis=-1), cells)
        init.mark(view, OTHER)
        cells[...] = True
    whole = Region.whole(4, 32)
    assert (FRESH in init.codes(whole)) == (not plain.all())
    assert (init.uniform == OTHER) == plain.all()


def _two_placed(reader, at=32, dtype=None):
    """Write one, write two over it (from byte `at`), then read."""

    def kernel(x):
        one = nl.ndarray((128, 16), nl.float32, nl.sbuf, address=(0, 0))
        two = nl.ndarray((128, 16), dtype or nl.float32, nl.sbuf, address=(0, at))
        nisa.dma_copy(dst=one, src=x)
        nisa.memset(two, 3.0)
        return reader(one, two)

    return kernel


def test_reading_what_another_placed_tensor_has_overwritten_is_reported():
    x = normal(128, 16)
    with pytest.warns(NkiSimulatorWarning, match=r"rule memory\.overwritten"):
        found = run(_two_placed(lambda one, two: store(nl.negative(one))), x)
    np.testing.assert_array_equal(found[:, :8], -x[:, :8])
    assert (found[:, 8:] == -3).all()


@pytest.mark.parametrize(
    ("reader", "at"),
    [
        (lambda one, two: store(nl.negative(one)), 64),  # side by side
        (lambda one, two: store(nl.negative(one[:, 0:8])), 32),  # the part that is left
        (lambda one, two: store(nl.negative(two)), 32),  # the newer of the two
    ],
)
def test_placed_tensors_that_are_read_in_time_are_silent(reader, at):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(_two_placed(reader, at), normal(128, 16))


def test_writing_again_makes_an_overwritten_tensor_readable():
    def reader(one, two):
        nisa.memset(one, 1.0)
        return store(nl.negative(one))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (run(_two_placed(reader), normal(128, 16)) == -1).all()
