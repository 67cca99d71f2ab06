"""What all instructions share: handles, dependencies, operands that overlap, run-time addresses."""

import warnings

import numpy as np
import pytest
from nki_sim import load, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, NkiSimulatorWarning, SimParams, parameters, record
from nxd_cp.simulators.nki_api import isa as nisa
from nxd_cp.simulators.nki_api import language as nl

X = normal(32, 16)


def test_an_instruction_can_depend_on_earlier_ones_only():
    def good(x):
        tile = sbuf(x.shape)
        first = nisa.dma_copy(tile, x, name="first")
        second = nisa.reciprocal(tile, tile, name="second")
        assert second.depends_on(first) == second
        assert (first.name, second.opcode) == ("first", "reciprocal")
        return store(tile)

    def backwards(x):
        tile = sbuf(x.shape)
        first = nisa.dma_copy(tile, x)
        second = nisa.reciprocal(tile, tile)
        first.depends_on(second)  # bad

    def out_of_a_loop(x):
        tile, found = load(x), []
        nl.fori_loop(0, 2, lambda i: found.append(nisa.reciprocal(tile, tile)))
        nisa.reciprocal(tile, tile).depends_on(found[0])  # bad

    run(good, X)
    rejects("instruction.depends_on", backwards, X)
    rejects("instruction.depends_on", out_of_a_loop, X)


def _shifted(to, at):
    def kernel(x):
        tile = load(x)
        nisa.tensor_copy(tile[:, to : to + 8], tile[:, at : at + 8])
        return store(tile)

    return kernel


@pytest.mark.parametrize(("to", "at"), [(0, 0), (0, 8), (8, 0)])
def test_an_output_over_all_of_an_input_or_none_is_silent(to, at):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(_shifted(to, at), X)


def test_an_output_over_part_of_an_input_is_caught():
    with pytest.warns(NkiSimulatorWarning, match=r"rule operand\.overlap"):
        found = run(_shifted(0, 1), X)
    np.testing.assert_array_equal(found[:, :8], X[:, 1:9])  # read before written

    def transposed(x):
        tile = load(x)
        view = tile.reshape_dim(1, (4, 4))
        nisa.tensor_copy(view, view.permute((0, 2, 1)))

    def broadcast(x):
        tile = load(x).reshape((32, 4, 4))
        nisa.tensor_tensor(tile, tile, tile[:, 0:1, :].broadcast(1, 4), nl.add)

    for kernel in (transposed, broadcast):
        with pytest.warns(NkiSimulatorWarning, match=r"rule operand\.overlap"):
            run(kernel, X)


def test_placed_tensors_that_overlap_are_seen():
    def kernel(x):
        one = nl.ndarray((32, 16), nl.float32, nl.sbuf, address=(0, 0))
        two = nl.ndarray((32, 16), nl.float32, nl.sbuf, address=(0, 32))
        nisa.dma_copy(one, x)
        nisa.dma_copy(two, x)
        nisa.tensor_copy(two, one)

    with pytest.warns(NkiSimulatorWarning, match=r"rule operand\.overlap"):
        run(kernel, X)


def test_interleaved_views_do_not_overlap():
    def kernel(x):
        tile = load(x)
        nisa.tensor_copy(tile[:, 0::2], tile[:, 1::2])
        nisa.tensor_scalar(tile, tile, nl.add, tile[:, 0:1])  # read before the engine starts
        return store(tile)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kernel, X)


def _selected(x):
    tile, out = load(x), sbuf((32, 4))
    at = nisa.register_alloc(8)
    nisa.tensor_copy(out, tile.ap([[16, 32], [1, 4]], scalar_offset=at, indirect_dim=1))
    return store(out)


def test_tensor_copy_reads_an_address_from_a_register():
    with record() as log:
        np.testing.assert_array_equal(run(_selected, X), X[:, 8:12])
    copies = [r for r in log if r.opcode == "tensor_copy"]
    assert len(copies) == 1
    assert copies[0].flags

    def outside(x):
        at = nisa.register_alloc(14)
        view = load(x).ap([[16, 32], [1, 4]], scalar_offset=at, indirect_dim=1)
        nisa.tensor_copy(sbuf((32, 4)), view)  # bad

    def vector(x):
        rows = nl.ndarray((32, 1), nl.int32)
        nisa.iota(rows, [[1, 1]], channel_multiplier=1)
        nisa.tensor_copy(sbuf((32, 16)), x.vector_select(0, rows))  # bad

    rejects("dynamic.bounds", outside, X)
    rejects("operand.run_time_address", vector, X)


def test_gen2_warns_of_a_run_time_address_outside_dma():
    with pytest.warns(NkiSimulatorWarning, match=r"rule tensor_copy\.run_time_address"):
        run(_selected, X, generation="gen2")
    with parameters(SimParams(strict=True)), pytest.raises(ValueError, match="NCC_IBIR829"):
        Kernel(_selected, "gen2")(X)


def test_nested_device_loops_and_register_store_on_gen2_warn():
    def nested(x):
        nl.fori_loop(0, 2, lambda i: nl.fori_loop(0, 2, lambda j: None))

    def stored(x):
        nisa.register_store(sbuf((1, 1), nl.int32), nisa.register_alloc(3))

    with pytest.warns(NkiSimulatorWarning, match=r"rule loop\.nested"):
        run(nested, X)
    with pytest.warns(NkiSimulatorWarning, match=r"rule register_store\.gen2"):
        run(stored, X, generation="gen2")


def test_too_many_instructions_warn(monkeypatch):
    def kernel(x):
        tile = load(x)
        for _ in range(4):
            nisa.reciprocal(tile, tile)

    monkeypatch.setattr("nxd_cp.simulators.nki_api.isa.issue.MAX_INSTRUCTIONS", 3)
    with pytest.warns(NkiSimulatorWarning, match=r"rule kernel\.instructions"):
        run(kernel, X)

    def endless(x):
        tile = load(x)
        while True:
            nisa.reciprocal(tile, tile)  # bad

    with pytest.warns(NkiSimulatorWarning):
        rejects("kernel.instructions", endless, X)
