"""The two cores of a Logical NeuronCore: sendrecv and core_barrier."""

import numpy as np
import pytest
from nki_sim import nisa, nl, normal, sbuf

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiDeadlockError,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
    record,
)

X = normal(128, 8)
H = 4


def pair(kernel, *arrays, generation="gen3"):
    return Kernel(kernel, generation)[2](*arrays)


def pair_rejects(rule, kernel, *arrays):
    with pytest.raises(NkiValidationError, match=rf"rule {rule} ") as caught:
        pair(kernel, *arrays)
    assert "# bad" in str(caught.value).splitlines()[-1], str(caught.value)


def mine(x):
    """This core's half of the columns."""
    tile = sbuf((128, H), x.dtype)
    nisa.dma_copy(tile, x[:, nl.ds(nl.program_id(0) * H, H)])
    return tile


def swap(x, dma_engine=nisa.dma_engine.dma):
    """The two halves change places."""
    core = nl.program_id(0)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile, received = mine(x), sbuf((128, H), x.dtype)
    nisa.sendrecv(tile, received, 1 - core, 1 - core, 0, dma_engine=dma_engine)
    nisa.dma_copy(out[:, nl.ds(core * H, H)], received)
    return out


@pytest.mark.parametrize("engine", [nisa.dma_engine.dma, nisa.dma_engine.gpsimd_dma])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_sendrecv_swaps_tiles(engine, dtype):
    x = (X * 10).astype(dtype)
    got = pair(lambda a: swap(a, dma_engine=engine), x)
    np.testing.assert_array_equal(got, np.roll(x, H, axis=1))


def test_sendrecv_may_overwrite_its_own_source():
    def kernel(x):
        core = nl.program_id(0)
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        tile = mine(x)
        nisa.sendrecv(tile, tile, 1 - core, 1 - core, 0)
        nisa.dma_copy(out[:, nl.ds(core * H, H)], tile)
        return out

    np.testing.assert_array_equal(pair(kernel, X), np.roll(X, H, axis=1))


def test_the_log_says_who_sends_to_whom():
    with record() as log:
        pair(swap, X)
    for core, other in ((0, 1), (1, 0)):
        record_ = log.cores[0, core][1]
        exchange = log.cores[0, core].exchanges[0]
        assert (record_.opcode, record_.detail) == ("sendrecv", "pipe0")
        assert exchange.seq == 1
        assert exchange.sends_to == exchange.receives_from == ((0, other),)
        assert exchange.bytes_sent == 128 * H * 4


def test_sendrecv_is_for_two_cores_and_ranks_0_and_1():
    def alone(x):
        nisa.sendrecv(mine(x), sbuf((128, H)), 0, 0, 0)  # bad

    with pytest.raises(NkiValidationError, match=r"rule pair\.cores "):
        Kernel(alone, "gen3")(X)
    with pytest.raises(NkiValidationError, match=r"rule instruction\.generation "):
        Kernel(alone, "gen2")(X)

    def far(x):
        nisa.sendrecv(mine(x), sbuf((128, H)), 2, 2, 0)  # bad

    def crossed(x):
        core = nl.program_id(0)
        nisa.sendrecv(mine(x), sbuf((128, H)), 1 - core, core, 0)  # bad

    pair_rejects(r"pair\.cores", far, X)
    pair_rejects(r"pair\.cores", crossed, X)


def test_sendrecv_tiles_match():
    def dtypes(x):
        nisa.sendrecv(mine(x), sbuf((128, H), nl.bfloat16), 1, 1, 0)  # bad

    def shapes(x):
        nisa.sendrecv(mine(x), sbuf((128, H + 1)), 1, 1, 0)  # bad

    def memory(x):
        nisa.sendrecv(x, sbuf((128, H)), 1, 1, 0)  # bad

    pair_rejects(r"sendrecv\.tiles", dtypes, X)
    pair_rejects(r"sendrecv\.tiles", shapes, X)
    pair_rejects(r"operand\.tile", memory, X)


def test_sendrecv_moves_padding_with_a_warning():
    def kernel(x):
        core, tile = nl.program_id(0), sbuf((48, 8))
        out = nl.ndarray((64, 8), x.dtype, nl.shared_hbm)
        nisa.dma_copy(tile[0:32], x[0:32])
        received = sbuf((48, 8))
        nisa.sendrecv(tile, received, 1 - core, 1 - core, 0)
        nisa.dma_copy(out[nl.ds(32 * core, 32)], received[0:32])
        return out

    with pytest.warns(NkiSimulatorWarning, match=r"dma_copy\.uninitialised"):
        np.testing.assert_array_equal(pair(kernel, X)[32:], X[:32])


def test_gpsimd_dma_has_a_size_limit():
    def kernel(x):
        core, big = nl.program_id(0), sbuf((128, 257))
        nisa.memset(big, 0)
        engine = nisa.dma_engine.gpsimd_dma
        nisa.sendrecv(big, sbuf((128, 257)), 1 - core, 1 - core, 0, dma_engine=engine)  # bad

    pair_rejects(r"sendrecv\.gpsimd_dma", kernel, X)


def test_cores_that_disagree_about_a_sendrecv_are_told():
    def kernel(x):
        core = nl.program_id(0)
        nisa.sendrecv(mine(x), sbuf((128, H)), 1 - core, 1 - core, core)  # bad

    with pytest.raises(NkiValidationError, match=r"pipe_id is 1 on rank 0 core 1, but 0 on"):
        pair(kernel, X)


def through_shared(x, barrier=True):
    """Each core writes a half and reads the other's."""
    core = nl.program_id(0)
    middle = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm, name="middle")
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    other, tile = nl.ds((1 - core) * H, H), sbuf((128, H), x.dtype)
    nisa.dma_copy(middle[:, nl.ds(core * H, H)], mine(x))
    if barrier:
        nisa.core_barrier(middle, (0, 1))
    nisa.dma_copy(tile, middle[:, other])
    nisa.dma_copy(out[:, other], tile)
    return out


@pytest.mark.parametrize("generation", ["gen3", "gen4"])
def test_a_barrier_makes_the_other_cores_writes_visible(generation):
    np.testing.assert_array_equal(pair(through_shared, X, generation=generation), X)


def test_a_barrier_that_only_one_core_reaches_is_a_deadlock():
    def kernel(x):
        if nl.program_id(0) == 0:
            nisa.core_barrier(x, (0, 1))  # bad

    with pytest.raises(
        NkiDeadlockError, match=r"waits in nki\.isa\.core_barrier.*core 1"
    ) as caught:
        pair(kernel, X)
    assert "# bad" in str(caught.value)


def test_a_barrier_is_for_two_cores_over_shared_hbm():
    def three(x):
        nisa.core_barrier(x, (0, 1, 2))  # bad

    def number(x):
        nisa.core_barrier(3, (0, 1))  # bad

    def on_chip(x):
        nisa.core_barrier(mine(x), (0, 1))  # bad
        return swap(x)

    def private(x):
        own = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.private_hbm)
        nisa.core_barrier(own, (0, 1))  # bad
        return swap(x)

    pair_rejects(r"pair\.cores", three, X)
    pair_rejects(r"core_barrier\.data", number, X)
    for kernel in (on_chip, private):
        with pytest.warns(NkiSimulatorWarning, match=r"core_barrier\.data"):
            np.testing.assert_array_equal(pair(kernel, X), pair(swap, X))
        with parameters(SimParams(strict=True)):
            pair_rejects(r"core_barrier\.data", kernel, X)

    def alone(x):
        nisa.core_barrier(x, (0,))

    with pytest.warns(NkiSimulatorWarning, match=r"pair\.alone"):
        Kernel(alone, "gen3")(X)
