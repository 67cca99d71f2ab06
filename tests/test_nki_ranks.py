"""Many ranks and cores in one process: launching, sharing, waiting, and every way to go wrong."""

import threading

import numpy as np
import pytest
import torch
from nki_sim import load, nisa, nl, normal, own_rows, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiDeadlockError,
    NkiValidationError,
    SimParams,
    parameters,
    record,
    simulate,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api import collectives as ncc

X = normal(128, 8)
HALF = 4
ALL = ncc.ReplicaGroup([[0, 1, 2]])


def shared(shape, dtype=nl.float32, name=""):
    return nl.ndarray(shape, dtype=dtype, buffer=nl.shared_hbm, name=name)


def halves(x):
    """Each core copies its half of the columns."""
    out, i = shared(x.shape, x.dtype), nl.program_id(0)
    tile = sbuf((128, x.shape[1] // nl.num_programs()), x.dtype)
    part = nl.ds(i * tile.shape[1], tile.shape[1])
    nisa.dma_copy(tile, x[:, part])
    nisa.dma_copy(out[:, part], tile)
    return out


def total(x, group, name="total"):
    """The sum over the group."""
    src, dst, out = shared(x.shape, name="src"), shared(x.shape, name=name), shared(x.shape)
    rows = own_rows(x.shape[0])
    nisa.dma_copy(src[rows], x[rows])
    if nl.num_programs() == 2:
        nisa.core_barrier(src, (0, 1))
    ncc.all_reduce(srcs=[src], dsts=[dst], replica_group=group, op=nl.add)
    nisa.dma_copy(out[rows], dst[rows])
    return out


def test_two_cores_share_inputs_and_fill_one_output():
    assert (Kernel(halves, "gen3")[2](X) == X).all()
    assert torch.equal(simulate(halves)[2](torch.from_numpy(X)), torch.from_numpy(X))


def test_the_grid_is_what_the_caller_asked_for():
    def grid():
        return nl.program_ndim(), nl.num_programs(), nl.program_id(0)

    assert Kernel(grid)() == (0, 1, 0)
    assert Kernel(grid)[1]() == (1, 1, 0)

    def width():
        return nl.program_ndim(), nl.num_programs()

    assert Kernel(width)[2]() == Kernel(width)[nl.nc(2)]() == (1, 2)


def test_two_cores_do_not_exist_on_gen2():
    with pytest.raises(NkiValidationError, match=r"rule kernel\.grid "):
        Kernel(halves, "gen2")[2](X)
    with pytest.raises(ValueError, match=r"expected kernel\[1\] or kernel\[2\]"):
        Kernel(halves, "gen3")[8]


def test_each_core_has_its_own_sbuf():
    def kernel(x):
        tile = sbuf((128, HALF), x.dtype)
        if nl.program_id(0) == 0:
            nisa.memset(tile, 1.0)
        out = shared(x.shape)
        nisa.tensor_copy(sbuf((128, HALF)), tile)  # bad
        return out

    with pytest.raises(NkiValidationError, match=r"memory\.uninitialised") as caught:
        Kernel(kernel, "gen3")[2](X)
    assert "rank 0 core 1: " in str(caught.value)


def test_cores_that_return_different_tensors_are_caught():
    def kernel(x):
        return halves(x), nl.program_id(0)

    with pytest.raises(NkiValidationError, match=r"rule kernel\.same_outputs "):
        Kernel(kernel, "gen3")[2](X)


@pytest.mark.parametrize("lnc", [1, 2])
def test_ranks_run_the_kernel_on_their_own_arguments(lnc):
    inputs = [X + r for r in range(3)]
    outputs = simulate_ranks(halves, [(x,) for x in inputs], lnc=lnc, generation="gen3")
    assert all((out == x).all() for out, x in zip(outputs, inputs, strict=True))
    named = simulate_ranks(halves, [{"x": x} for x in inputs], lnc=lnc, generation="gen3")
    assert all((out == x).all() for out, x in zip(named, inputs, strict=True))


def test_ranks_with_torch_tensors_and_a_kernel_that_writes_its_input():
    def double(x):
        tile = load(x)
        nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
        nisa.dma_copy(x, tile)

    tensors = [torch.full((128, 4), float(r)) for r in range(3)]
    simulate_ranks(double, [(t,) for t in tensors])
    assert [t[0, 0].item() for t in tensors] == [0.0, 2.0, 4.0]


def test_ranks_given_one_array_have_it_each_for_themselves():
    assert all((out == X).all() for out in simulate_ranks(halves, [(X,)] * 3))
    parts = [X[:, :4], X[:, 4:]]
    outputs = simulate_ranks(store_loaded, [(part,) for part in parts])
    assert all((out == part).all() for out, part in zip(outputs, parts, strict=True))

    def overwrite(x):
        tile = sbuf(x.shape)
        nisa.memset(tile, 7.0)
        nisa.dma_copy(x, tile)

    with pytest.raises(ValueError, match="writes its input 'x', which shares memory"):
        simulate_ranks(overwrite, [(X,)] * 2)
    assert not (X == 7).any()


def store_loaded(x):
    return store(load(x))


def test_arguments_of_ranks_are_checked():
    with pytest.raises(
        ValueError, match="expected a tuple or dict of arguments for rank 0, got nd"
    ):
        simulate_ranks(halves, [X])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one rank"):
        simulate_ranks(halves, [])
    with pytest.raises(TypeError, match="missing 1 required positional"):
        simulate_ranks(halves, [(X,), ()])
    with pytest.raises(RuntimeError, match="inside a kernel"):
        run(lambda: simulate_ranks(halves, [(X,)]))


def test_a_python_error_in_one_rank_ends_all_with_its_own_traceback():
    def kernel(x, rank):
        if rank == 1:
            raise KeyError("mine")
        return total(x, ALL)

    before = threading.active_count()
    with pytest.raises(KeyError, match="mine") as caught:
        simulate_ranks(kernel, [(X, r) for r in range(3)])
    assert caught.traceback[-1].name == "kernel"
    assert caught.value.__notes__ == ["in rank 1 core 0 of the simulated run"]
    assert threading.active_count() == before
    assert (simulate_ranks(total, [(X, ALL)] * 3)[2] == 3 * X).all()


def test_a_rank_that_swallows_exceptions_does_not_hide_the_first_one():
    def kernel(x, rank):
        if rank == 1:
            raise KeyError("mine")
        for _ in range(3):
            try:
                total(x, ALL)
            except BaseException:
                continue
        return x

    with pytest.raises(KeyError, match="mine"):
        simulate_ranks(kernel, [(X, r) for r in range(3)])


def test_a_broken_rule_names_rank_core_and_line():
    def kernel(x):
        if nl.program_id(0) == 1:
            nisa.tensor_copy(sbuf((128, 8)), x)  # bad
        return halves(x)

    with pytest.raises(NkiValidationError, match=r"operand\.tile") as caught:
        simulate_ranks(kernel, [(X,), (X,)], lnc=2, generation="gen3")
    last = str(caught.value).splitlines()[-1]
    assert "rank 0 core 1: " in last
    assert "# bad" in last


def test_a_rank_that_never_comes_is_a_deadlock_at_once():
    def kernel(x, rank):
        if rank != 1:
            total(x, ALL)  # waits

    with pytest.raises(NkiDeadlockError) as caught:
        simulate_ranks(kernel, [(X, r) for r in range(3)])
    text = str(caught.value)
    wait = "waits in nki.collectives.all_reduce for rank 1 core 0 (finished: rank 1 core 0)"
    assert text.count(wait) == 2
    assert "rank 1 core 0: finished" in text
    assert text.count("ncc.all_reduce(srcs=[src]") == 2


def test_ranks_that_wait_crosswise_are_a_deadlock():
    pairs = [ncc.ReplicaGroup([[0, 1]]), ncc.ReplicaGroup([[1, 2]]), ncc.ReplicaGroup([[2, 0]])]

    def kernel(x, group):
        return total(x, group)

    with pytest.raises(NkiValidationError):
        simulate_ranks(kernel, [(X, group) for group in pairs])


@pytest.mark.parametrize("what", ["op", "shape", "dtype", "group", "instruction"])
def test_ranks_that_disagree_are_told_with_both_lines(what):
    def kernel(x, rank):
        odd = rank == 2
        shape = (64, 8) if odd and what == "shape" else (128, 8)
        dtype = nl.int32 if odd and what == "dtype" else nl.float32
        group = ncc.ReplicaGroup([[2, 1, 0]]) if odd and what == "group" else ALL
        src, dst = shared(shape, dtype, "src"), shared(shape, dtype, "dst")
        big = shared((384, 8), name="big")
        nisa.dma_copy(src, sbuf_of(shape, dtype))
        if odd and what == "instruction":
            ncc.all_gather([src], [big], ALL, 0)  # second
        else:
            op = nl.maximum if odd and what == "op" else nl.add
            ncc.all_reduce([src], [dst], group, op)  # first

    with pytest.raises(NkiValidationError, match=r"rule ranks\.agreement ") as caught:
        simulate_ranks(kernel, [(X, r) for r in range(3)])
    text = str(caught.value)
    assert "on rank 2 core 0" in text
    assert "on rank 0 core 0" in text
    assert "# first" in text
    assert "rank 2 core 0: " in text.splitlines()[-1]


def sbuf_of(shape, dtype):
    tile = sbuf(shape, dtype)
    nisa.memset(tile, 1)
    return tile


def test_runs_are_deterministic_and_the_log_has_every_core():
    def logs():
        with record() as log:
            simulate_ranks(total, [(X, ALL)] * 3, lnc=2, generation="gen3")
        return log

    first, second = logs(), logs()
    assert sorted(first.cores) == [(r, c) for r in range(3) for c in range(2)]
    assert first.cores[0, 0] is first
    for place, log in first.cores.items():
        assert list(log) == list(second.cores[place])
        assert [r.opcode for r in log] == ["dma_copy", "core_barrier", "all_reduce", "dma_copy"]
        _, exchange = log.exchanges
        assert exchange == second.cores[place].exchanges[1]
        assert (exchange.seq, exchange.meeting, exchange.kind) == (2, 1, "all_reduce")
        assert exchange.members == tuple(first.cores)
        assert exchange.bytes_sent == round(2 * 2 / 3 * X.nbytes)
        assert exchange.group == (0, 1, 2)
        source = first.buffers[exchange.sources[0].buffer]
        assert (source.name, source.rank, source.core) == ("src", place[0], -1)


def test_shape_only_mode_works_on_ranks():
    with parameters(SimParams(values=False)), record() as log:
        out = simulate_ranks(total, [(X, ALL)] * 3, lnc=2, generation="gen3")
    assert all(np.isnan(o).all() for o in out)
    assert len(log.cores[2, 1]) == 4


def test_threads_can_each_simulate_ranks():
    results: dict[int, bool] = {}

    def work(i):
        outputs = simulate_ranks(total, [(X + i, ALL)] * 3)
        results[i] = all(np.allclose(out, 3 * (X + i)) for out in outputs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_a_collective_without_other_ranks_is_a_copy():
    alone = ncc.ReplicaGroup([[0]])
    assert (run(total, X, alone) == X).all()
    text = rejects_group(ALL)
    assert "run it with simulate_ranks" in text


def rejects_group(group):
    def kernel(x):
        src = shared(x.shape, name="s")
        nisa.dma_copy(src, x)
        ncc.all_reduce([src], [shared(x.shape, name="d")], group, nl.add)  # bad

    return rejects("collective.group", kernel, X)


def test_a_group_is_a_partition_of_the_ranks_that_run():
    for groups in ([[0, 0]], [[1]], [[0, 7]]):
        rejects_group(ncc.ReplicaGroup(groups))
    rejects_group([[0]])
    for wrong in (3, [0, 1], [[0, 1.5]], ["01"], [[None]]):
        with pytest.raises(ValueError, match=r"expected lists of ranks"):
            ncc.ReplicaGroup(wrong)
