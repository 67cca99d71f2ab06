"""Instructions that only move memory take padding along: with a warning, and unwritten as before.

Also the rules that a caller may tolerate, for kernels that cannot be changed.
"""

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError, SimParams, parameters

X = normal(128, 32)
SOME = 20  # columns that are written
IDENTITY = np.eye(128, dtype=np.float32)


def padded(x, columns=SOME):
    """A tile of which the first columns were written."""
    tile = sbuf(x.shape)
    nisa.dma_copy(dst=tile[:, 0:columns], src=x[:, 0:columns])
    return tile


def on_tensor(x, eye):
    out = psum((32, 128))
    nisa.nc_transpose(dst=out, data=padded(x))
    return out


def on_vector(x, eye):
    out = sbuf((32, 32))
    nisa.nc_transpose(dst=out, data=padded(x)[0:32], engine=nisa.engine.vector)
    return out


def by_matmul(x, eye):
    out = psum((32, 128))
    nisa.nc_matmul(dst=out, stationary=padded(x), moving=load(eye), is_transpose=True)
    return out


def shuffled(x, eye):
    out = sbuf((128, 32))
    nisa.nc_stream_shuffle(dst=out, src=padded(x), shuffle_mask=list(range(31, -1, -1)))
    return out


MIRRORED = X.reshape(4, 32, 32)[:, ::-1].reshape(128, 32)
MOVES = [
    (on_tensor, "transpose.uninitialised", np.s_[:SOME], X.T),
    (on_vector, "transpose.uninitialised", np.s_[:SOME], X[:32].T),
    (by_matmul, "transpose.uninitialised", np.s_[:SOME], X.T),
    (shuffled, "nc_stream_shuffle.uninitialised", np.s_[:, :SOME], MIRRORED),
]


@pytest.mark.parametrize(("move", "rule", "written", "expected"), MOVES)
def test_what_was_written_arrives_and_padding_warns(move, rule, written, expected):
    with pytest.warns(NkiSimulatorWarning, match=rule):
        got = run(lambda x, eye: store(move(x, eye)[written]), X, IDENTITY)
    np.testing.assert_array_equal(got, expected[written])


@pytest.mark.parametrize(("move", "rule", "written", "expected"), MOVES)
def test_computing_with_padding_that_was_moved_is_caught(move, rule, written, expected):
    def kernel(x, eye):
        moved = move(x, eye)
        nisa.activation(dst=sbuf(moved.shape), op=nl.exp, data=moved)  # bad

    with pytest.warns(NkiSimulatorWarning, match=rule):
        rejects("memory.uninitialised", kernel, X, IDENTITY)


@pytest.mark.parametrize(("move", "rule", "written", "expected"), MOVES)
def test_strict_padding_is_an_error(move, rule, written, expected):
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError, match=rule):
        run(move, X, IDENTITY)


def test_a_product_of_padding_is_caught():
    def mixed(x, eye):
        out = psum((32, 128))
        mix = load(eye)
        nisa.memset(mix[0:32, 0:2], 1.0)
        nisa.nc_matmul(dst=out, stationary=padded(x), moving=mix, is_transpose=True)  # bad

    def product(x, eye):
        nisa.nc_matmul(dst=psum((32, 128)), stationary=padded(x), moving=load(eye))  # bad

    def multiplied(x, eye):
        nisa.nc_transpose(dst=psum((32, 128)), data=padded(x))  # bad

    with pytest.warns(NkiSimulatorWarning, match="transpose.uninitialised"):
        rejects("memory.uninitialised", mixed, X, IDENTITY)
    with pytest.warns(NkiSimulatorWarning, match="transpose.uninitialised"):
        rejects("memory.uninitialised", multiplied, X, IDENTITY, generation="gen2")
    rejects("memory.uninitialised", product, X, IDENTITY)


def test_nonzero_with_count_leaves_unwritten_what_it_was_not_given():
    def count(x, rows):
        tile, out = sbuf(x.shape), sbuf((128, 33), nl.int32)
        nisa.dma_copy(dst=tile[0:16], src=x[0:16])
        nisa.nonzero_with_count(dst=out, src=tile)
        return store(out[0:rows])

    def bad(x):
        tile, out = sbuf(x.shape), sbuf((128, 33), nl.int32)
        nisa.dma_copy(dst=tile[0:16], src=x[0:16])
        nisa.nonzero_with_count(dst=out, src=tile)
        nisa.activation(dst=sbuf((1, 33)), op=nl.exp, data=out[32:33])  # bad

    with pytest.warns(NkiSimulatorWarning, match="nonzero_with_count.uninitialised"):
        got = run(lambda x: count(x, 1), X)
    with pytest.warns(NkiSimulatorWarning, match="nonzero_with_count.uninitialised"):
        rejects("memory.uninitialised", bad, X)
    np.testing.assert_array_equal(got[0], [*range(32), 32])


def half(x):
    """Compute on a tile of which half was written, and use that half."""
    out = sbuf(x.shape)
    nisa.activation(dst=out, op=nl.exp, data=padded(x))  # bad
    return store(out[:, 0:SOME])


def test_a_tolerated_rule_warns_and_what_is_unwritten_stays_nan():
    rejects("memory.uninitialised", half, X)
    with parameters(SimParams(tolerate=("memory.uninitialised",))):
        with pytest.warns(NkiSimulatorWarning, match="memory.uninitialised"):
            got = run(half, X)
        with pytest.warns(NkiSimulatorWarning, match="memory.uninitialised"):
            fresh = run(lambda x: store(nl.exp(sbuf(x.shape))), X)
    np.testing.assert_allclose(got, np.exp(X[:, :SOME]), rtol=4 * np.finfo(np.float32).eps)
    assert np.isnan(fresh).all()


def test_other_rules_are_not_tolerated():
    with parameters(SimParams(tolerate="view.partition_dim")):
        rejects("memory.uninitialised", half, X)


def test_an_inferred_rule_can_be_tolerated_under_strict():
    def kernel(x):
        moved = on_vector(x, None)
        nisa.tensor_copy(dst=sbuf((SOME, 32)), src=moved[:SOME])

    strict = SimParams(strict=True, tolerate=["transpose.uninitialised"])
    with parameters(strict), pytest.warns(NkiSimulatorWarning, match="transpose.uninitialised"):
        run(kernel, X)


def test_only_rules_that_exist_can_be_tolerated():
    with (
        parameters(SimParams(tolerate=("memory.unwritten",))),
        pytest.raises(ValueError, match=r"expected ids of rules.*got memory\.unwritten"),
    ):
        run(half, X)


def many_banks(x):
    """Nine banks of sums before any is read."""
    tiles = []
    for _ in range(9):
        tiles.append(psum((128, 512)))
        nisa.memset(tiles[-1], 1.0)
    total = sbuf((128, 512))
    nisa.memset(total, 0.0)
    for tile in tiles:
        nisa.tensor_tensor(dst=total, data1=total, data2=tile, op=nl.add)
    return store(total)


def test_capacity_in_program_order_can_be_tolerated():
    with pytest.raises(NkiValidationError, match=r"memory\.capacity"):
        run(many_banks, X)
    with (
        parameters(SimParams(tolerate=("memory.capacity",))),
        pytest.warns(NkiSimulatorWarning, match=r"memory\.capacity"),
    ):
        assert (run(many_banks, X) == 9).all()


def test_a_tensor_allocated_early_lives_from_its_first_use():
    def kernel(x):
        out = psum((128, 2048))  # half of the memory, used last
        first, second = psum((128, 2048)), psum((128, 1024))
        nisa.memset(first, 1.0)
        nisa.memset(second, 2.0)
        total = sbuf((128, 1024))
        nisa.tensor_copy(dst=total, src=first[:, 0:1024])
        nisa.tensor_tensor(dst=total, data1=total, data2=second, op=nl.add)
        nisa.memset(out, 3.0)
        nisa.tensor_tensor(dst=total, data1=total, data2=out[:, 0:1024], op=nl.add)
        return store(total)

    assert (run(kernel, X) == 6).all()
