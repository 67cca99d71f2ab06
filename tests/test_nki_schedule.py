"""with_schedule: names are known, edges have no cycle, results do not change."""

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, NkiValidationError

X = normal(8, 4)


def two_steps(x):
    tile, one, two, out = load(x), sbuf(x.shape), sbuf(x.shape), sbuf(x.shape)
    nisa.reciprocal(one, tile, name="recip")
    nisa.tensor_scalar(two, tile, nl.add, 1.0, name="plus1")
    nisa.tensor_tensor(out, one, two, nl.add)
    return store(out)


@pytest.mark.parametrize("edges", [[("plus1", "recip")], [("plus1", ["recip"])], []])
def test_a_schedule_changes_no_result(edges):
    kernel = Kernel(two_steps, "gen3")
    np.testing.assert_array_equal(kernel.with_schedule(edges)(X), kernel(X))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("plus1", "minus1")], "no instruction is called minus1"),
        ([("plus1", "recip"), ("recip", ["plus1"])], "a cycle"),
        ([("plus1", 3)], "something else than names"),
        (["plus1"], "no pair"),
    ],
)
def test_bad_schedules_are_caught(edges, message):
    with pytest.raises((NkiValidationError, TypeError), match=message) as caught:
        Kernel(two_steps, "gen3").with_schedule(edges)(X)
    assert "rule kernel.schedule " in str(caught.value)
