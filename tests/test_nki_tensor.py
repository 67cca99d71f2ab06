"""Views select the same elements as NumPy would, and never reach outside."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import (
    NkiSimulatorWarning,
    NkiUnsupportedError,
    NkiValidationError,
    SimParams,
    parameters,
)

X = normal(128, 4, 6)


def _same(view, expected):
    """The view of an SBUF copy of X, checked against NumPy on X."""
    got = run(lambda x: store(view(load(x))), X)
    np.testing.assert_array_equal(got, expected)


def _slices(size):
    return st.tuples(st.integers(0, size - 1), st.integers(1, size), st.integers(1, 3)).map(
        lambda t: slice(t[0], min(size, t[0] + t[1]), t[2])
    )


@given(st.tuples(st.just(slice(None)), _slices(4), _slices(6)))
@settings(max_examples=40)
def test_slices_are_numpy_slices(key):
    _same(lambda t: t[key], X[key])


def test_views_are_numpy_views():
    _same(lambda t: t[..., 2], X[..., 2])
    _same(lambda t: t[:, -1], X[:, -1])
    _same(lambda t: t[:, nl.ds(1, 2), 3], X[:, 1:3, 3])
    _same(lambda t: t[0:64].permute((0, 2, 1)), X[0:64].transpose(0, 2, 1))
    _same(lambda t: t.reshape((128, 24)), X.reshape(128, 24))
    _same(lambda t: t.reshape((128, 2, 12)), X.reshape(128, 2, 12))
    _same(lambda t: t.flatten_dims(1, 2).reshape_dim(1, (8, -1)), X.reshape(128, 8, 3))
    _same(lambda t: t[:, 0:1].squeeze_dim(1).expand_dim(1).broadcast(1, 5), X[:, 0:1].repeat(5, 1))
    _same(
        lambda t: t.rearrange(("p", "a", ("b", "c")), ("p", "c", ("a", "b")), {"c": 2}),
        X.reshape(128, 4, 3, 2).transpose(0, 3, 1, 2).reshape(128, 2, 12),
    )
    _same(lambda t: t.ap([[24, 128], [2, 5]], offset=1), X.reshape(128, 24)[:, 1:11:2])
    _same(lambda t: t.slice(2, 1, 5, 2).select(1, 3), X[:, 3, 1:5:2])


def test_another_dtype_reads_the_same_bytes():
    got = run(lambda x: store(load(x).view(nl.uint16)), X)
    np.testing.assert_array_equal(got, X.view(np.uint16))
    back = run(lambda x: store(load(x).view(nl.uint8)[..., 4:12].view(nl.float32)), X)
    np.testing.assert_array_equal(back, X[..., 1:3])


def test_integers_drop_hbm_dims_and_keep_the_partition_dim():
    def kernel(x):
        tile = load(x)
        return (x[0].shape, x[0, 0, 0].shape, tile[0].shape, tile[:, 1, 2].shape, tile[3, 1].shape)

    assert run(kernel, X) == ((4, 6), (1,), (1, 4, 6), (128, 1), (1, 6))


@pytest.mark.parametrize(
    "key", [np.s_[:, 4], np.s_[:, 2:5], np.s_[128], np.s_[:, 2:2], np.s_[:, -5], np.s_[:, 3:1]]
)
def test_an_index_outside_the_tensor_is_caught(key):
    def kernel(x):
        load(x)[key]  # bad

    rejects("view.bounds", kernel, X)


@pytest.mark.parametrize("key", ["x", None, 1.5, True, np.True_, np.array([1, 2]), (..., "x")])
def test_what_is_no_index_is_a_type_error(key):
    with pytest.raises(TypeError, match=r"expected an int, slice, nl\.ds or \.\.\. as index"):
        run(lambda x: load(x)[key], X)


def test_an_index_has_one_ellipsis():
    _same(lambda t: t[..., 0:2, 1:3, :][..., 0], X[:2, 1:3, 0])
    with pytest.raises(TypeError, match=r"expected one \.\.\. in an index"):
        run(lambda x: load(x)[..., 0:2, ...], X)


def test_a_cores_share_of_an_hbm_tensor_may_be_empty_but_not_moved():
    def share(x, rows):
        mine = x[nl.ds(0, rows)]
        assert (mine.shape, x[2:2].shape) == ((rows, *x.shape[1:]), (0, *x.shape[1:]))
        for row in range(rows):
            nisa.dma_copy(sbuf((1, 24)), mine[row : row + 1].reshape((1, 24)))
        return store(load(x))

    def moved(x):
        nisa.dma_copy(nl.ndarray((1, 4, 6), nl.float32, nl.shared_hbm)[0:0], x[0:0])  # bad

    for rows in (0, 1):
        np.testing.assert_array_equal(run(lambda x, rows=rows: share(x, rows), X), X)
    rejects("dma_copy.elements", moved, X)


def test_a_slice_that_numpy_would_clip_is_caught():
    def kernel(x):
        x[0:129]  # bad

    rejects("view.bounds", kernel, X)


@pytest.mark.parametrize(
    ("method", "arguments", "rule"),
    [
        ("squeeze_dim", (-1,), "view.bounds"),
        ("squeeze_dim", (3,), "view.bounds"),
        ("reshape_dim", (-1, (2, 3)), "view.bounds"),
        ("flatten_dims", (1, -1), "view.bounds"),
        ("flatten_dims", (1, 3), "view.bounds"),
        ("flatten_dims", (2, 1), "view.shape"),
        ("expand_dim", (-1,), "view.bounds"),
        ("expand_dim", (4,), "view.bounds"),
        ("broadcast", (-1, 2), "view.bounds"),
        ("broadcast", (2, 0), "view.shape"),
        ("slice", (-1, 0, 1), "view.bounds"),
        ("slice", (1, -2, 4), "view.bounds"),
        ("slice", (1, 2, 2), "view.bounds"),
        ("select", (3, 0), "view.bounds"),
        ("select", (1, -1), "view.bounds"),
    ],
)
def test_dims_and_indices_of_view_methods_count_from_the_front(method, arguments, rule):
    """Also where a view of another shape, or none, would come out without a word."""

    def kernel(x):
        view = load(x)[..., 0:1]
        getattr(view, method)(*arguments)  # bad

    rejects(rule, kernel, X)


def test_illegal_views_are_caught():
    def permute(x):
        load(x).permute((1, 0, 2))  # bad

    def split(x):
        load(x).reshape_dim(0, (2, 64))  # bad

    def merge(x):
        load(x)[:, :, 0:3].flatten_dims(1, 2)  # bad

    def resize(x):
        load(x).reshape((64, 48))  # bad

    def size(x):
        load(x).reshape((128, 25))  # bad

    def pattern(x):
        load(x).ap([[12, 128], [1, 4]])  # bad

    def reach(x):
        beyond = load(x).ap([[24, 128], [1, 25]])
        nisa.tensor_copy(dst=sbuf((128, 25)), src=beyond)  # bad

    def into(x):
        beyond = sbuf((128, 24)).ap([[24, 128], [1, 24]], offset=24)
        nisa.dma_copy(dst=beyond, src=x.reshape((128, 24)))  # bad

    def names(x):
        load(x).rearrange(("p", "a", "b"), ("p", "a", "c"))  # bad

    rejects("view.rearrange", names, X)
    rejects("view.partition_dim", permute, X)
    rejects("view.partition_dim", split, X)
    rejects("view.layout", merge, X)
    rejects("view.partition_dim", resize, X)
    rejects("view.shape", size, X)
    rejects("view.partition_dim", pattern, X)
    for outside in (reach, into):
        with pytest.warns(NkiSimulatorWarning, match="view.outside"):
            assert "made at" in rejects("view.bounds", outside, X)


def test_a_pattern_outside_its_tensor_may_be_made_but_not_used():
    def kernel(x):
        tile, out = load(x), sbuf((128, 8))
        for i in range(4):  # the fourth is one too many
            part = tile.ap([[24, 128], [1, 8]], offset=8 * i)
            if i < 3:
                nisa.tensor_copy(dst=out, src=part)
        return store(out)

    with pytest.warns(NkiSimulatorWarning, match=r"view\.outside"):
        got = run(kernel, X)
    np.testing.assert_array_equal(got, X.reshape(128, 24)[:, 16:])


def test_a_pattern_steps_by_one_partition_also_where_another_step_is_tolerated():
    def kernel(x):
        return store(load(x).ap([[12, 128], [1, 12]]))

    with (
        parameters(SimParams(tolerate=("view.partition_dim",))),
        pytest.warns(NkiSimulatorWarning, match="view.partition_dim"),
    ):
        got = run(kernel, X)
    np.testing.assert_array_equal(got, X.reshape(128, 24)[:, :12])


def test_a_tensor_as_a_condition_is_there_whatever_it_holds():
    def kernel(x):
        tile = sbuf((128, 4))
        nisa.memset(tile, 0.0 if tile else 1.0)
        return store(tile)

    with pytest.warns(NkiSimulatorWarning, match=r"tensor\.truth"):
        assert (run(kernel, X) == 0).all()
    with (
        parameters(SimParams(strict=True)),
        pytest.raises(NkiValidationError, match=r"tensor\.truth"),
    ):
        run(kernel, X)


def test_what_is_not_implemented_names_itself():
    def kernel(x):
        x.indirect(x)

    with pytest.raises(NkiUnsupportedError, match="indirect"):
        run(kernel, X)
