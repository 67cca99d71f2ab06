"""Unordered accesses of two cores to shared HBM, the worst legal order, equal programs."""

import warnings

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, own_rows, sbuf

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api import collectives as ncc

X = normal(128, 8)
SEEDS = range(6)


def shared(x, name=""):
    return nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm, name=name)


def other_rows(count):
    return nl.ds((1 - nl.program_id(0)) * (count // 2), count // 2)


def exchange(x, order):
    """Each core writes its rows of a shared tensor, and then reads the other's."""
    middle, unrelated, out = shared(x, "middle"), shared(x, "unrelated"), shared(x)
    mine, other = own_rows(128), other_rows(128)
    tile = sbuf((64, 8), x.dtype)
    nisa.dma_copy(tile, x[mine])
    nisa.dma_copy(middle[mine], tile)  # bad
    order(middle, unrelated, tile)
    nisa.dma_copy(tile, middle[other])  # read
    nisa.dma_copy(out[other], tile)
    return out


def barrier(middle, unrelated, tile):
    nisa.core_barrier(middle, (0, 1))


def nothing(middle, unrelated, tile):
    pass


def other_barrier(middle, unrelated, tile):
    nisa.core_barrier(unrelated, (0, 1))


def sendrecv(middle, unrelated, tile):
    peer = 1 - nl.program_id(0)
    nisa.sendrecv(tile, sbuf((64, 8)), peer, peer, 0)


def run(order, **params):
    with parameters(SimParams(**params)):
        return Kernel(lambda x: exchange(x, order), "gen3")[2](X)


def rejects(rule, kernel, *arrays):
    with pytest.raises(NkiValidationError, match=rf"rule {rule} ") as caught:
        Kernel(kernel, "gen3")[2](*arrays)
    assert "# bad" in str(caught.value).splitlines()[-1], str(caught.value)
    return str(caught.value)


def test_a_barrier_orders_the_tensor_it_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(run(barrier), X)


@pytest.mark.filterwarnings("ignore:(?s).*never written")  # core 0 runs first, and reads too early
def test_a_dropped_barrier_is_caught_with_both_lines():
    text = rejects(r"race\.shared_hbm", lambda x: exchange(x, nothing), X)
    assert "core 1 writes what core 0 read at" in text
    assert "# read" in text


def test_reading_what_the_other_wrote_is_a_race():
    def kernel(x):
        middle = shared(x, "middle")
        if nl.program_id(0) == 0:
            nisa.dma_copy(middle, sbuf_of(1.0))  # write
        else:
            load(middle)
            nisa.dma_copy(sbuf((128, 8)), middle)

    with pytest.raises(NkiValidationError, match=r"rule race\.shared_hbm ") as caught:
        Kernel(kernel, "gen3")[2](X)
    assert "core 1 reads what core 0 wrote at" in str(caught.value)
    assert "# write" in str(caught.value)


@pytest.mark.parametrize("order", [other_barrier, sendrecv])
def test_another_meeting_between_the_two_is_warned_about(order):
    with pytest.warns(NkiSimulatorWarning, match=r"rule race\.other_meeting "):
        np.testing.assert_array_equal(run(order), X)
    with pytest.raises(NkiValidationError, match=r"race\.other_meeting"):
        run(order, strict=True)


def test_writing_what_the_other_read_is_a_race_too():
    def kernel(x):
        middle = shared(x, "middle")
        if nl.program_id(0) == 0:
            nisa.dma_copy(sbuf((128, 8)), x)  # read
        else:
            nisa.dma_copy(x, sbuf_of(1.0))  # bad
        return middle

    text = rejects(r"race\.shared_hbm", kernel, X.copy())
    assert "core 1 writes what core 0 read at" in text
    assert "# read" in text


def sbuf_of(value, shape=(128, 8)):
    tile = sbuf(shape)
    nisa.memset(tile, value)
    return tile


def test_both_writing_is_warned_about():
    def kernel(x, same):
        out = shared(x)
        nisa.dma_copy(out, sbuf_of(1.0 if same else float(nl.program_id(0))))
        return out

    with pytest.warns(NkiSimulatorWarning, match=r"rule race\.same_bytes "):
        assert (Kernel(kernel, "gen3")[2](X, True) == 1).all()
    with pytest.warns(NkiSimulatorWarning, match=r"rule race\.both_write "):
        Kernel(kernel, "gen3")[2](X, False)
    with (
        parameters(SimParams(values=False)),
        pytest.warns(NkiSimulatorWarning, match=r"race\.same_bytes"),
    ):
        Kernel(kernel, "gen3")[2](X, False)


@pytest.mark.filterwarnings("ignore::nxd_cp.simulators.nki_api.NkiSimulatorWarning")
def test_reading_back_ones_own_bytes_is_no_race():
    def kernel(x):
        middle, out, rows = shared(x, "middle"), shared(x), own_rows(128)
        nisa.dma_copy(middle, sbuf_of(2.0))
        tile = load(middle)
        nisa.dma_copy(out[rows], tile[rows])
        return out

    assert (Kernel(kernel, "gen3")[2](X) == 2).all()


def test_strided_and_dynamic_accesses_count_by_their_bytes():
    def columns(x, shift):
        """Interleaved columns: disjoint bytes, overlapping bounds."""
        out, i = shared(x), nl.program_id(0)
        nisa.dma_copy(out[:, i : 8 - shift * i : 2], sbuf_of(float(i), (128, 4)))  # bad
        return out

    np.testing.assert_array_equal(Kernel(columns, "gen3")[2](X, 0)[0], [0, 1] * 4)

    def rows(x, index):
        """Both cores write the row that a table names."""
        out, at = shared(x), sbuf((1, 1), nl.int32)
        nisa.dma_copy(at, index[nl.program_id(0) : nl.program_id(0) + 1])
        row = out.ap([[8, 1], [1, 8]], scalar_offset=at, indirect_dim=0)
        nisa.dma_copy(row, sbuf_of(float(nl.program_id(0)), (1, 8)))

    with parameters(SimParams(strict=True)):
        Kernel(rows, "gen3")[2](X, np.array([[3], [4]], np.int32))
        with pytest.raises(NkiValidationError, match=r"rule race\.both_write "):
            Kernel(rows, "gen3")[2](X, np.array([[3], [3]], np.int32))


def test_a_collective_of_both_cores_orders_its_tensors():
    group = ncc.ReplicaGroup([[0, 1]])

    def kernel(x, with_barrier):
        src, dst, out, rows = shared(x, "src"), shared(x, "dst"), shared(x), own_rows(128)
        nisa.dma_copy(src[rows], load(x)[rows])
        if with_barrier:
            nisa.core_barrier(src, (0, 1))
        ncc.all_reduce([src], [dst], group, nl.add)
        nisa.dma_copy(out[rows], dst[rows])
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for out in simulate_ranks(kernel, [(X, True)] * 2, lnc=2, generation="gen3"):
            np.testing.assert_array_equal(out, 2 * X)
    with pytest.warns(NkiSimulatorWarning, match=r"rule race\.collective "):
        simulate_ranks(kernel, [(X, False)] * 2, lnc=2, generation="gen3")


def reused(x, use_first):
    """SBUF of a permute, used again under another name."""
    group = ncc.ReplicaGroup([[0, 1]])
    src = nl.ndarray(x.shape, x.dtype, nl.sbuf, address=(0, 0))
    dst = nl.ndarray(x.shape, x.dtype, nl.sbuf, address=(0, 32))
    nisa.dma_copy(src, x)
    ncc.collective_permute_implicit([[src]], [[dst]], group)  # started
    out = shared(x)
    if use_first:
        nisa.dma_copy(out, dst)
    again = nl.ndarray(x.shape, x.dtype, nl.sbuf, address=(0, 0))
    nisa.memset(again, 0.0)
    nisa.dma_copy(out, dst)
    return out


def test_memory_of_a_collective_in_flight_is_not_used_under_another_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate_ranks(reused, [(X, True)] * 2)
    with pytest.warns(NkiSimulatorWarning, match=r"rule race\.in_flight ") as caught:
        simulate_ranks(reused, [(X, False)] * 2)
    text = str(caught[0].message)
    assert "# started" in text
    assert "nisa.memset(again, 0.0)" in text.splitlines()[-1]


def test_late_writes_show_a_missing_barrier_in_the_results():
    for seed in SEEDS:
        np.testing.assert_array_equal(run(barrier, adversarial=seed), X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NkiSimulatorWarning)
        results = [run(other_barrier, adversarial=seed) for seed in SEEDS]
        np.testing.assert_array_equal(run(other_barrier), X)
    assert all(np.isnan(result).any() for result in results)


def ring(x, group, listed):
    """All-gather by a ring; `listed` takes the list's order for granted."""
    buffers, n = [shared(x, "a"), shared(x, "b")], 4
    out = nl.ndarray((n, *x.shape), dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(buffers[0], x)
    for step in range(n):
        here, there = buffers[step % 2], buffers[1 - step % 2]
        pattern = [[x.shape[1], x.shape[0]], [1, x.shape[1]]]
        rank = ncc.collective_permute_implicit_current_processing_rank_id(step, group)
        if listed is None:
            nisa.dma_copy(out.ap(pattern, scalar_offset=rank, indirect_dim=0), here)
        else:
            nisa.dma_copy(out[(listed - step) % n], here)
        if step < n - 1:
            ncc.collective_permute_implicit([[here]], [[there]], group)
    return out


def test_a_kernel_that_guesses_the_order_of_the_ring_is_caught():
    group = ncc.ReplicaGroup([[0, 1, 2, 3]])
    inputs = [X + r for r in range(4)]

    def gathered(seed, guess):
        calls = [(x, group, r if guess else None) for r, x in enumerate(inputs)]
        with parameters(SimParams(adversarial=seed)):
            return all((out == np.stack(inputs)).all() for out in simulate_ranks(ring, calls))

    assert gathered(None, True)
    assert all(gathered(seed, False) for seed in SEEDS)
    assert not all(gathered(seed, True) for seed in SEEDS)


def loops(x, count):
    out, rows = shared(x), own_rows(128)

    def body(i):
        nisa.dma_copy(out[rows], load(x)[rows])

    nl.fori_loop(0, count, body)
    return out


def test_device_loops_have_the_same_trip_counts_on_both_cores():
    np.testing.assert_array_equal(Kernel(lambda x: loops(x, 2), "gen3")[2](X), X)
    with pytest.raises(NkiValidationError, match=r"rule lnc\.device_loops ") as caught:
        Kernel(lambda x: loops(x, 2 + nl.program_id(0)), "gen3")[2](X)
    text = str(caught.value)
    assert "core 0 has the end at" in text
    assert "core 1 has loop iteration at" in text
    assert "nl.fori_loop(0, count, body)" in text


def test_different_instructions_on_the_two_cores_are_warned_about():
    def kernel(x):
        out = shared(x)
        if nl.program_id(0) == 0:
            nisa.dma_copy(out, load(x))  # only here
        return out

    with pytest.warns(NkiSimulatorWarning, match=r"rule lnc\.same_program ") as caught:
        Kernel(kernel, "gen3")[2](X)
    text = str(caught[0].message)
    assert "core 0 has dma_copy at" in text
    assert "core 1 has the end at" in text
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError):
        Kernel(kernel, "gen3")[2](X)
