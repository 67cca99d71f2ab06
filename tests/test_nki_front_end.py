"""What compilers reject in a kernel's Python: warnings at the line, errors when strict."""

import ast
import threading
import time
import warnings

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, store

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    front_end,
    parameters,
)

X = normal(8, 4)


def plain(x, scale=2.0, sizes=(1, 2)):
    tile = load(x)
    nisa.tensor_scalar(tile, tile, nl.multiply, scale)
    return store(tile)


def identity(x, scale=None):
    if scale is None:  # bad
        scale = 2.0
    return plain(x, scale)


def keywords(x, *, scale=2.0):  # bad
    return plain(x, scale)


def lists(x, sizes=[1, 2]):  # noqa: B006  bad
    return plain(x)


def keys(x):
    names = {1: x}  # bad
    return plain(names[1])


def attempts(x):
    try:  # bad
        return plain(x)
    finally:
        pass


def generates(x):
    return [plain(t) for t in tuple(t for t in (x,))][0]  # noqa: RUF015  bad


@pytest.mark.parametrize(
    ("kernel", "rule"),
    [
        (identity, "front_end.is"),
        (keywords, "front_end.signature"),
        (lists, "front_end.signature"),
        (keys, "front_end.dict_keys"),
        (attempts, "front_end.python"),
        (generates, "front_end.python"),
    ],
)
def test_constructs_outside_the_subset_are_reported_at_their_line(kernel, rule):
    with pytest.warns(NkiSimulatorWarning) as caught:
        found = Kernel(kernel, "gen3")(X)
    np.testing.assert_array_equal(found, 2 * X)
    (text,) = {str(w.message) for w in caught}
    assert f"rule {rule} " in text
    assert "bad" in text.splitlines()[-1]
    assert caught[0].filename == __file__
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError, match=rule):
        Kernel(kernel, "gen3")(X)


def test_a_kernel_inside_the_subset_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Kernel(plain, "gen3")(X, 2.0, sizes=(3, 4))


def test_a_list_as_an_argument_is_reported():
    with pytest.warns(NkiSimulatorWarning, match=r"rule front_end\.list_argument"):
        Kernel(plain, "gen3")(X, sizes=[3, 4])


def test_a_decorated_kernel_inside_a_kernel_is_reported():
    inner = Kernel(plain, "gen3")

    def outer(x):
        return inner(x)

    with pytest.warns(NkiSimulatorWarning, match=r"rule front_end\.nested_kernel"):
        np.testing.assert_array_equal(Kernel(outer, "gen3")(X), 2 * X)


def test_a_function_without_source_runs():
    scope = {"load": load, "store": store}
    exec("def kernel(x):\n    return store(load(x)) if x is not None else None", scope)
    np.testing.assert_array_equal(Kernel(scope["kernel"], "gen3")(X), X)


def test_many_findings_of_one_kind_are_one_warning():
    def kernel(x, a=None, b=None):
        if a is None and b is None:
            return store(load(x))
        return None if a is not None else x

    with pytest.warns(NkiSimulatorWarning) as caught:
        Kernel(kernel, "gen3")(X)
    (text,) = {str(w.message) for w in caught}
    assert "and 2 more in this function" in text


def _if_register(x):
    register = nisa.register_alloc(1)
    if register:  # bad
        return store(load(x))
    return x


def _not_register(x):
    register = nisa.register_alloc(0)
    return store(load(x)) if not register else x  # bad


@pytest.mark.parametrize("kernel", [_if_register, _not_register])
def test_an_if_over_a_register_is_reported_at_its_line(kernel):
    with pytest.warns(NkiSimulatorWarning, match=r"rule front_end\.if_register") as caught:
        Kernel(kernel, "gen3")(X)
    assert caught[0].filename == __file__
    assert str(caught[0].message).endswith("# bad")
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError, match="if_register"):
        Kernel(kernel, "gen3")(X)


def test_a_while_over_a_register_is_no_if():
    def kernel(x):
        register = nisa.register_alloc(1)
        while register:
            nisa.register_move(register, 0)
        return store(load(x))

    with pytest.warns(NkiSimulatorWarning) as caught:
        Kernel(kernel, "gen3")(X)
    broken = [w for w in caught if w.category is NkiSimulatorWarning]  # the loop is old, not wrong
    assert all("front_end.python" in str(w.message) for w in broken)


def test_two_threads_never_parse_at_the_same_time(monkeypatch):
    """In CPython 3.11 that is a SystemError once in a while."""
    right, inside, overlaps = ast.parse, [], []

    def parse(*arguments, **options):
        overlaps.append(len(inside))
        inside.append(1)
        time.sleep(0.05)
        inside.pop()
        return right(*arguments, **options)

    monkeypatch.setattr(front_end.ast, "parse", parse)
    codes = [plain.__code__, identity.__code__, normal.__code__, load.__code__]
    threads = [threading.Thread(target=front_end._source, args=(code,)) for code in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0] * len(codes)
