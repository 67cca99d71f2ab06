"""NKIObject's initialiser, with and without @dataclass, and names that kernels import."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, run, store

from nxd_cp.simulators.nki_api import simulate_ranks
from nxd_cp.simulators.nki_api.surface import nki_modules


class Plain(nl.NKIObject):
    x: int
    y: bool = False
    z = None

    def toggle(self):
        self.y = not self.y


@dataclass
class Decorated(nl.NKIObject):
    index = None
    tiles: list = field(default_factory=list)
    width: int = 4

    def __post_init__(self):
        self.double = 2 * self.width


class Own(nl.NKIObject):
    x: int = 1

    def __init__(self, x):
        self.x = 10 * x


def test_fields_are_annotations_and_plain_attributes():
    c = Plain(1, z="last")
    c.toggle()
    assert (c.x, c.y, c.z) == (1, True, "last")
    assert Plain().x is None


def test_a_dataclass_gets_the_same_initialiser():
    a, b = Decorated(index=3), Decorated(width=5)
    a.tiles.append(1)
    assert (a.index, a.tiles, a.double) == (3, [1], 8)
    assert (b.index, b.tiles, b.double) == (None, [], 10)


def test_an_own_initialiser_is_kept():
    assert Own(2).x == 20


def test_wrong_fields_are_caught():
    with pytest.raises(TypeError, match="'w'"):
        Plain(w=1)
    with pytest.raises(TypeError, match="'x'"):
        Plain(1, x=2)
    with pytest.raises(TypeError, match="3 fields"):
        Plain(1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    scale: float = 2.0


class Nested(nl.NKIObject):
    inner = None
    arrays: tuple = ()
    owner = None


def test_arrays_inside_arguments_that_are_objects_are_tensors():
    x, y = normal(8, 4), normal(8, 4, seed=1)

    def kernel(given):
        out = load(given.inner.x)
        nisa.tensor_scalar(out, out, nl.multiply, given.inner.scale)
        nisa.tensor_tensor(out, out, load(given.arrays[0]), nl.add)
        nisa.dma_copy(given.arrays[0], load(given.inner.x))  # an input that is written
        return store(out)

    given = Nested(inner=Frozen(x), arrays=(y,))
    given.owner = given
    before = y.copy()
    np.testing.assert_array_equal(run(kernel, given), np.float32(2) * x + before)
    assert (y == x).all()
    assert given.inner.x is x  # the caller's object keeps its arrays
    assert given.arrays[0] is y


def test_an_array_in_the_objects_of_two_ranks_is_each_ones_own():
    x = normal(8, 4)

    def kernel(given):
        nisa.dma_copy(given.x, load(given.x))
        return store(load(given.x))

    for out in simulate_ranks(kernel, [(Frozen(x),), (Frozen(x),)]):
        np.testing.assert_array_equal(out, x)


def test_names_that_kernels_import():
    modules = nki_modules()
    assert modules["nki"].dtype.bfloat16 is nl.bfloat16
    assert modules["nki.dtype"]("float32") is nl.float32

    dtype = modules["nki.dtype"]

    def annotated(one: dtype | None, other: Optional[dtype]):  # noqa: UP045  as kernels write it
        return one, other

    assert annotated(nl.float32, None) == ("float32", None)
