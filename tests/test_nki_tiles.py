"""nki.language functions that issue instructions: load, store, operators, reductions, matmul."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, NkiUnsupportedError, record

X, Y = normal(128, 4, 8), normal(128, 4, 8, seed=1)
A, B = normal(128, 64), normal(128, 96, seed=1)


def _stored(function):
    def kernel(x, y=0):
        if isinstance(y, int):
            return store(function(nl.load(x)))  # bad
        return store(function(nl.load(x), nl.load(y)))  # bad

    return kernel


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: nl.add(x, y), X + Y),
        (lambda x, y: nl.subtract(2.0, x), 2 - X),
        (lambda x, y: nl.multiply(x, y[:, :, 0:1]), X * Y[:, :, :1]),
        (lambda x, y: nl.exp(x), np.exp(X)),
        (lambda x, y: nl.reciprocal(x), 1 / X),
        (lambda x, y: nl.negative(x), -X),
        (lambda x, y: nl.greater(x, 0.0), (X > 0).astype(np.float32)),
        (lambda x, y: nl.max(x, axis=2), X.max(axis=2)),
        (lambda x, y: nl.min(x, axis=(1, 2), keepdims=True), X.min(axis=(1, 2), keepdims=True)),
        (lambda x, y: nl.max(x, axis=(1, 2)), X.max(axis=(1, 2))[:, None]),
        (lambda x, y: nl.broadcast_to(x[:, :, 3:4], (128, 4, 8)), X[:, :, 3:4] + 0 * X),
        (lambda x, y: nl.zeros_like(x), 0 * X),
    ],
)
def test_functions_on_tiles(function, expected):
    np.testing.assert_array_equal(run(_stored(function), X, Y), expected)


def test_sum_takes_integers_exactly():
    x = np.round(8 * X)
    np.testing.assert_array_equal(run(_stored(lambda x: nl.sum(x, axis=-1)), x), x.sum(axis=-1))


def test_dtype_of_results():
    out = run(_stored(lambda x: nl.copy(x, dtype=nl.bfloat16)), X)
    assert (out == X.astype(ml_dtypes.bfloat16)).all()
    mixed = _stored(lambda x, y: nl.add(x, y))
    with pytest.raises(NkiUnsupportedError, match="pass dtype="):
        run(mixed, X, Y.astype(ml_dtypes.bfloat16))
    asked = _stored(lambda x, y: nl.add(x, y, dtype=nl.float32))
    assert run(asked, X, Y.astype(ml_dtypes.bfloat16)).dtype == np.float32


def test_matmul_and_transpose_give_psum_tiles():
    x, y = np.round(A), np.round(B)
    np.testing.assert_array_equal(run(_stored(lambda x, y: nl.matmul(x, y, True)), x, y), x.T @ y)
    x = np.ascontiguousarray(x.T)
    np.testing.assert_array_equal(run(_stored(lambda x, y: nl.matmul(x, y)), x, y), x @ y)
    np.testing.assert_array_equal(run(_stored(nl.transpose), A), A.T)


def test_load_store_and_constants():
    def kernel(x):
        out = nl.ndarray((64, 128), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.add(nl.load_transpose2d(x), nl.load(nl.shared_constant(A.T))))
        return out

    np.testing.assert_array_equal(run(kernel, A), 2 * A.T)


def test_language_rules():
    def load_from_chip(x):
        nl.load(load(x))  # bad

    def store_to_chip(x):
        nl.store(sbuf(x.shape), load(x))  # bad

    rejects("language.load", load_from_chip, A)
    rejects("language.load", store_to_chip, A)
    rejects("language.tile", _stored(lambda x, y: nl.add(x, y)), A, B)  # bad
    rejects("language.axis", _stored(lambda x: nl.sum(x, axis=1)), X)  # bad
    rejects("language.axis", _stored(lambda x: nl.sum(x, axis=0)), A)  # bad

    def in_hbm(x):
        nl.exp(x)  # bad

    rejects("language.tile", in_hbm, A)
    rejects("language.tile", _stored(lambda x: nl.broadcast_to(x[0:2], (128, 64))), A)  # bad


@pytest.mark.parametrize("partitions", [20, 32, 100, 128])
def test_a_row_is_repeated_across_partitions(partitions):
    def kernel(x):
        return store(nl.broadcast_to(load(x[3:4]), (partitions, 64), dtype=nl.bfloat16))

    expected = np.broadcast_to(A[3:4], (partitions, 64)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(kernel, A), expected)


def test_the_log_names_the_kernels_line():
    def kernel(x):
        return store(nl.exp(load(x)))

    with record() as log:
        Kernel(kernel, "gen3")(A)
    line = next(r for r in log if r.opcode == "activation")
    assert line.file == __file__
    assert line.line == kernel.__code__.co_firstlineno + 1
    assert nisa.engine.scalar.name == line.engine
