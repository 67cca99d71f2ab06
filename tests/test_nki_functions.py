"""nki.language functions made of several instructions, against fp64 and NumPy."""

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, SimParams, parameters

X, Y = normal(128, 4, 8), normal(128, 4, 8, seed=1)
FLAT = normal(128, 32)


def stored(function):
    """A kernel of up to three tensors that stores the function of their tiles."""

    def kernel(x, y=0, z=0):
        if isinstance(y, int):
            return store(function(nl.load(x)))  # bad
        if isinstance(z, int):
            return store(function(nl.load(x), nl.load(y)))  # bad
        return store(function(nl.load(x), nl.load(y), nl.load(z)))

    return kernel


def close(found, exact, plain):
    """No worse than twice the same mathematics in float32 NumPy, or half an fp32 ulp."""
    exact = np.asarray(exact, np.float64)
    allowed = 2 * np.abs(plain - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(found - exact).max() <= allowed


def softmax(x, axis):
    top = np.exp(x - x.max(axis=axis, keepdims=True))
    return top / top.sum(axis=axis, keepdims=True)


def rms(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(1e-6))


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (lambda x: nl.mean(x, axis=1), lambda x: x.mean(axis=1, keepdims=True)),
        (lambda x: nl.var(x, axis=1), lambda x: x.var(axis=1, keepdims=True)),
        (lambda x: nl.softmax(x, axis=1), lambda x: softmax(x, 1)),
        (lambda x: nl.softmax(x), lambda x: softmax(x, -1)),
        (lambda x: nl.rms_norm(x, x, axis=1, n=32), lambda x: rms(x) * x),
    ],
)
def test_functions_are_as_close_to_fp64_as_numpy_in_fp32(function, reference):
    close(run(stored(function), FLAT), reference(FLAT.astype(np.float64)), reference(FLAT))


def test_means_of_several_dims_keep_dims_as_documented():
    means = run(stored(lambda x: nl.mean(x, axis=[1, 2], keepdims=True)), X)
    assert means.shape == (128, 1, 1)
    close(
        means, X.astype(np.float64).mean(axis=(1, 2), keepdims=True), X.mean((1, 2))[:, None, None]
    )
    assert run(stored(lambda x: nl.var(x, axis=2, keepdims=False)), X).shape == (128, 4, 1)


@pytest.mark.parametrize("name", ["floor", "ceil", "trunc"])
def test_rounding_is_exact(name):
    special = np.array(
        [0, -0.5, 0.5, 1.5, -1.5, 2.5, -2.5, 3.7, -3.2, 2.0**24, -(2.0**30), 1 - 2**-24]
    )
    x = np.concatenate(
        [np.tile(special.astype(np.float32), 8).reshape(32, 3), 99 * normal(32, 29)], 1
    )
    np.testing.assert_array_equal(run(stored(getattr(nl, name)), x), getattr(np, name)(x))


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_trigonometry_reduces_its_argument(name):
    x = np.linspace(-1000, 1000, 128 * 32, dtype=np.float32).reshape(128, 32)
    exact = getattr(np, name)(x.astype(np.float64))
    found = run(stored(getattr(nl, name)), x)
    # the argument is turned by at most 160 turns; each product and sum may lose half an ulp of x
    assert np.abs(found - exact).max() <= 2 * np.finfo(np.float32).eps * np.abs(x).max()
    small = x / 1000
    plain = np.sin(small) * np.reciprocal(np.sin(small + np.float32(np.pi / 2)))
    close(run(stored(nl.tan), small), np.tan(small.astype(np.float64)), plain)


def test_an_argument_outside_the_valid_range_of_sin_is_reported():
    def kernel(x):
        tile = load(x)
        nisa.activation(tile, nl.sin, tile)

    with pytest.warns(NkiSimulatorWarning, match=r"rule activation\.range"):
        run(kernel, np.full((4, 4), 9.0, np.float32))


def test_sin_of_the_scalar_engine_leaves_the_sine_beyond_pi_as_documented():
    def kernel(x):
        tile = load(x)
        nisa.activation(tile, nl.sin, tile)
        return store(tile)

    within = np.linspace(-np.pi, np.pi, 64, dtype=np.float32).reshape(4, 16)
    np.testing.assert_array_equal(run(kernel, within), np.sin(within))
    with pytest.warns(NkiSimulatorWarning, match=r"rule activation\.range"):
        far = run(kernel, np.float32([[9, -9, 0.5, np.nan], [np.pi, -np.pi, 3.2, -3.2]]))
    assert np.round(far[0, 0], 2) == np.float32(27.65)  # the documented figure
    assert far[0, 1] == -far[0, 0]
    assert far[0, 2] == np.sin(np.float32(0.5))
    assert np.isnan(far[0, 3])
    # one function, without a step at the ends of the valid range
    np.testing.assert_allclose(far[1], np.sin(np.float32([np.pi, -np.pi, 3.2, -3.2])), atol=1e-6)


def test_where_and_logic():
    mask = (X > 0).astype(np.float32)
    chosen = run(stored(lambda m, x, y: nl.where(m, x, y)), mask, X, Y)
    np.testing.assert_array_equal(chosen, np.where(X > 0, X, Y))
    number = run(stored(lambda m, x: nl.where(m, x, 0.0)), mask, X)
    np.testing.assert_array_equal(number, np.where(X > 0, X, 0))
    np.testing.assert_array_equal(run(stored(nl.logical_not), mask), 1 - mask)
    every = run(stored(lambda m: nl.all(m, axis=2)), mask)
    np.testing.assert_array_equal(every, mask.all(axis=2))


def test_gather_and_expand():
    index = np.random.default_rng(0).integers(0, 32, (128, 5), np.int32)
    found = run(stored(nl.gather_flattened), FLAT, index)
    np.testing.assert_array_equal(found, np.take_along_axis(FLAT, index, 1))
    assert run(stored(lambda x: nl.expand_dims(x, -1)), FLAT).shape == (128, 32, 1)


def test_assignment_copies_moves_and_fills():
    def kernel(x):
        out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        tile, half = sbuf(x.shape), sbuf((128, 16))
        tile[...] = x
        half[...] = 2.0
        tile[:, 0:16] = half
        tile[:, 16] = tile[:, 17]
        out[...] = tile
        return out

    expected = FLAT.copy()
    expected[:, :16], expected[:, 16] = 2, FLAT[:, 17]
    np.testing.assert_array_equal(run(kernel, FLAT), expected)


@pytest.mark.parametrize("value", [0, 1, 3])
def test_hbm_can_be_filled(value):
    def kernel():
        return nl.full((3, 7000, 2), value, nl.int32, nl.shared_hbm)

    np.testing.assert_array_equal(run(kernel), np.full((3, 7000, 2), value))


def test_constants_from_arrays_and_files(tmp_path):
    path = tmp_path / "constant.npy"
    np.save(path, FLAT)
    for constant in (FLAT, str(path)):
        found = run(lambda c=constant: store(nl.load(nl.shared_constant(c))))
        np.testing.assert_array_equal(found, FLAT)


def test_device_print_shows_values(capsys):
    def kernel(x):
        nl.device_print("tile", load(x))

    run(kernel, FLAT[:2, :2])
    shown = capsys.readouterr().out
    assert shown.startswith("tile [[")
    assert f"{FLAT[0, 0]:.5f}"[:6] in shown
    with parameters(SimParams(values=False)):
        run(kernel, FLAT[:2, :2])
    assert capsys.readouterr().out.startswith("tile (2, 2) float32 sbuf")
    rejects("language.device_print", lambda: nl.device_print(3, sbuf((4, 4))))  # bad


def test_what_the_device_cannot_do():
    rejects("language.not_on_device", stored(nl.fmod), X, Y)
    rejects("language.not_on_device", stored(nl.mod), X, Y)

    def from_psum(x):
        nl.rsqrt(nl.matmul(nl.load(x), nl.load(x), True))  # bad

    rejects("language.rsqrt", from_psum, FLAT)
    good = run(stored(nl.rsqrt), X * X + 1)
    np.testing.assert_array_equal(good, np.float32(1) / np.sqrt(X * X + 1))
    with pytest.warns(NkiSimulatorWarning, match=r"rule operand\.divide"):
        run(stored(lambda x: nl.divide(x, x)), X)
    for known in (
        lambda x: nl.power(x, 2.0),
        lambda x: nl.add(x, x[:, :, 0:1]),
    ):
        with pytest.warns(NkiSimulatorWarning, match=r"rule language\.known_issue"):
            run(stored(known), X)


def test_packed_types_are_names_only():
    assert nl.float8_e4m3fn_x4 != nl.float8_e4m3fn
    assert nl.float8_e4m3fn_x4 == "float8_e4m3fn_x4"
