"""Rules that are checked once a kernel has ended show the line of the tensor or call concerned."""

import warnings

import pytest
from nki_sim import load, nisa, nl, normal, own_rows, run, sbuf, store

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
    simulate,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api import collectives as ncc

X = normal(128, 8)


def helper_on_chip(x):
    tile = nl.zeros((128, 8), nl.float32)  # bad
    nisa.dma_copy(tile, x)
    return store(tile), tile


def unwritten(x):
    out = nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm)  # bad
    nisa.dma_copy(out[0:64], x[0:64])
    return out


def last_line(call):
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError) as caught:
        call()
    return str(caught.value).splitlines()[-1]


@pytest.mark.parametrize("kernel", [helper_on_chip, unwritten])
def test_an_output_that_is_none_shows_its_allocation(kernel):
    assert "# bad" in last_line(lambda: run(kernel, X))
    line = last_line(lambda: simulate_ranks(kernel, [(X,), (X + 1,)]))
    assert "# bad" in line
    assert line.startswith("  at rank 0: ")


def test_an_input_that_a_collective_wrote_shows_the_kernel():
    def kernel(x):
        group = ncc.ReplicaGroup([[0]])
        src = nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm, name="src")
        dst = nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm, name="dst")  # bad
        nisa.dma_copy(src, x)
        ncc.all_reduce([src], [dst], group, nl.add)
        return dst

    assert "# bad" in last_line(lambda: run(kernel, X))


def test_memory_read_unwritten_shows_where_the_user_allocated_it():
    def kernel(x):
        tile = nl.empty_like(load(x))  # here
        nisa.tensor_copy(sbuf((128, 8)), tile)

    with pytest.raises(NkiValidationError, match="never written") as caught:
        run(kernel, X)
    first = kernel.__code__.co_firstlineno
    assert f"allocated at {__file__}:{first + 1}\n" in str(caught.value)


def _copied(x):
    out = nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm)
    rows = own_rows(128)
    nisa.dma_copy(out[rows], x[rows])
    return out


def test_cores_that_differ_show_where():
    def loops(x):
        for _ in nl.dynamic_range(1 + nl.program_id(0)):  # bad
            load(x)
        return _copied(x)

    def returns(x):  # bad
        out = _copied(x)
        return out if nl.program_id(0) else (out,)

    for kernel in (loops, returns):
        assert "# bad" in last_line(lambda kernel=kernel: Kernel(kernel, "gen3")[2](X))


def test_a_name_that_the_schedule_misses_shows_with_schedule():
    kernel = Kernel(lambda x: store(load(x)), "gen3")
    with pytest.raises(NkiValidationError, match="no instruction is called b, c") as caught:
        kernel.with_schedule([("b", "c")])(X)  # bad
    assert "# bad" in str(caught.value).splitlines()[-1]


def test_a_warning_at_the_end_is_given_once_for_a_line():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default", NkiSimulatorWarning)
        for _ in range(3):
            simulate(unwritten)(X)
    found = [w for w in seen if "kernel.unwritten_output" in str(w.message)]
    assert len(found) == 1
    assert found[0].filename == __file__


def test_ranks_are_read_by_the_front_end_too():
    def kernel(x, scale=None):
        if scale is None:  # bad
            scale = 1.0
        return store(load(x))

    assert "# bad" in last_line(lambda: simulate_ranks(kernel, [(X,), (X,)]))
    with pytest.warns(NkiSimulatorWarning, match=r"front_end\.list_argument"):
        simulate_ranks(lambda xs: store(load(xs[0])), [([X],), ([X],)])
