"""Registers, device loops and addresses known at run time."""

import linecache
import warnings

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, NkiUnsupportedError, SimParams, parameters, record
from nxd_cp.simulators.nki_api import log as flags

X = normal(64, 48)
ROWS = (np.arange(32) * 5 % 64).astype(np.int32).reshape(32, 1)
SKIP = nisa.oob_mode.skip


def _at(tensor, width, **options):
    """Rows of 48 elements from `tensor`."""
    return tensor.ap([[48, width], [1, 48]], **options)  # bad, in tests of its arguments


def _gather(oob_mode=nisa.oob_mode.error, mode=nisa.dge_mode.unknown):
    def kernel(x, rows):
        out, index = sbuf((32, 48)), load(rows)
        nisa.memset(out, -1)
        view = _at(x, 32, vector_offset=index, indirect_dim=0)
        nisa.dma_copy(out, view, oob_mode=oob_mode, dge_mode=mode)  # bad
        return store(out)

    return kernel


def test_gather_by_a_vector_of_rows():
    np.testing.assert_array_equal(run(_gather(), X, ROWS), X[ROWS[:, 0]])

    def select(x, rows):
        out = sbuf((32, 48))
        nisa.dma_copy(out, x.vector_select(0, load(rows)))
        return store(out)

    np.testing.assert_array_equal(run(select, X, ROWS), X[ROWS[:, 0]])


@pytest.mark.parametrize(
    ("dtype", "nl_dtype", "columns"), [(np.float16, nl.float16, 96), (np.int32, nl.int32, 48)]
)
def test_gather_of_the_bits_as_another_dtype(dtype, nl_dtype, columns):
    def by_vector(x, rows):
        out, index = sbuf((32, columns), nl_dtype), load(rows)
        pattern = [[columns, 32], [1, columns]]
        nisa.dma_copy(out, x.ap(pattern, vector_offset=index, dtype=out.dtype))
        return store(out)

    def by_scalar(x, row):
        out = sbuf((1, columns), nl_dtype)
        row = load(row)
        nisa.dma_copy(out, x.ap([[1, 1], [1, columns]], scalar_offset=row, dtype=out.dtype))
        return store(out)

    np.testing.assert_array_equal(run(by_vector, X, ROWS), X[ROWS[:, 0]].view(dtype))
    np.testing.assert_array_equal(run(by_scalar, X, ROWS[:1]), X[ROWS[0]].view(dtype))


def test_an_index_out_of_bounds_raises_or_is_skipped():
    rows = ROWS.copy()
    rows[3], rows[4] = 64, -1
    rejects("dynamic.bounds", _gather(), X, rows)
    expected = X[ROWS[:, 0]].copy()
    expected[3:5] = -1
    with record() as log:
        np.testing.assert_array_equal(run(_gather(SKIP), X, rows), expected)
    copy = next(r for r in log if r.flags)
    assert copy.flags == flags.DYNAMIC | flags.SKIPPED
    assert copy.sources[1].shape == (32, 1)


def test_scatter_by_a_vector_of_rows():
    def kernel(x, rows):
        out = nl.ndarray((64, 48), dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(out, x)
        tile, index = load(x[0:32]), load(rows)
        nisa.dma_copy(_at(out, 32, vector_offset=index), tile)
        return out

    expected = X.copy()
    expected[ROWS[:, 0]] = X[:32]
    np.testing.assert_array_equal(run(kernel, X, ROWS), expected)


@pytest.mark.parametrize("as_register", [False, True])
def test_one_scalar_moves_the_whole_view(as_register):
    def kernel(x, start):
        index = load(start)
        if as_register:
            register = nisa.register_alloc()
            nisa.register_load(register, index)
            index = register
        rows, column, one = sbuf((8, 48)), sbuf((64, 1)), sbuf((1, 48))
        nisa.dma_copy(rows, _at(x, 8, offset=96, scalar_offset=index, indirect_dim=0))
        view = x.ap([[48, 64], [1, 1]], scalar_offset=index, indirect_dim=1)
        nisa.dma_copy(column, view)
        nisa.dma_copy(one, x.select(0, index))
        return store(rows), store(column), store(one)

    rows, column, one = run(kernel, X, np.array([[7]], np.int32))
    np.testing.assert_array_equal(rows, X[9:17])
    np.testing.assert_array_equal(column, X[:, 7:8])
    np.testing.assert_array_equal(one, X[7:8])


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((64, 6, 1, 8), 2),
        ((64, 6, 1, 8, 1), 2),
        ((8, 8, 1, 48), 2),
        ((64, 6, 8, 1), 3),
        ((64, 1, 48), 1),
    ],
)
def test_a_scalar_counts_in_the_stride_of_a_dim_of_size_one(shape, dim):
    unit = int(np.prod(shape[dim:]))  # the elements within the dim

    def kernel(x, start):
        index, out = load(start), sbuf((1, 16))
        view = x.reshape(shape).ap([[48, 1], [1, 16]], scalar_offset=index, indirect_dim=dim)
        nisa.dma_copy(out, view)  # bad
        return store(out)

    got = run(kernel, X, np.array([[5]], np.int32))
    np.testing.assert_array_equal(got[0], X.reshape(-1)[5 * unit : 5 * unit + 16])
    rejects("dynamic.bounds", kernel, X, np.array([[X.size // unit]], np.int32))


def test_one_scalar_offset_may_lie_on_any_partition_but_must_be_written():
    def kernel(x, rows, first=0):
        index, out = sbuf((32, 1), nl.int32), sbuf((1, 48))
        nisa.dma_copy(index[first:32], rows[first:32])
        nisa.dma_copy(out, _at(x, 1, scalar_offset=index[5:6], indirect_dim=0))  # bad
        return store(out)

    np.testing.assert_array_equal(run(kernel, X, ROWS), X[ROWS[5]])
    rejects("memory.uninitialised", lambda x, rows: kernel(x, rows, 6), X, ROWS)


def test_rules_of_run_time_addresses():
    def on_an_engine(x, rows):
        view = load(x).ap([[48, 64], [1, 8]], scalar_offset=load(rows[0:1]), indirect_dim=1)
        nisa.reciprocal(sbuf((64, 8)), view)  # bad

    def both(x, rows):
        index = load(rows)
        _at(x, 32, scalar_offset=index[0:1], vector_offset=index)  # bad

    def on_chip_rows(x, rows):
        _at(load(x), 32, vector_offset=load(rows))  # bad

    def floats(x, rows):
        _at(x, 32, vector_offset=load(x[0:32, 0:1]))  # bad

    rejects("operand.run_time_address", on_an_engine, X, ROWS)
    rejects("dynamic.offset", both, X, ROWS)
    rejects("dynamic.offset", on_chip_rows, X, ROWS)
    rejects("dynamic.offset", floats, X, ROWS)
    rejects("dma_copy.dynamic", _gather(mode=nisa.dge_mode.none), X, ROWS)
    rejects("dma_copy.dynamic", _gather(mode=nisa.dge_mode.hwdge), X, ROWS)
    with pytest.raises(NkiUnsupportedError, match="run-time addresses"):
        run(lambda x, rows: _at(x, 32, vector_offset=load(rows))[0:8], X, ROWS)


def _copy_rows(x, bounds):
    """Rows lower, lower + 2, ... below upper, copied through SBUF by a device loop."""
    out = nl.ndarray((64, 48), dtype=x.dtype, buffer=nl.shared_hbm)
    tile, registers = sbuf((1, 48)), [nisa.register_alloc(), nisa.register_alloc(0)]
    zero = sbuf((64, 48))
    nisa.memset(zero, 0)
    nisa.dma_copy(out, zero)
    for i, register in enumerate(registers):
        nisa.register_load(register, bounds[i : i + 1])

    def body(i):
        nisa.dma_copy(tile, _at(x, 1, scalar_offset=i))
        nisa.dma_copy(_at(out, 1, scalar_offset=i), tile)

    nl.fori_loop(registers[0], registers[1], body, step=2)
    return out


def test_fori_loop_runs_on_registers_and_logs_iterations():
    with record() as log:
        out = run(_copy_rows, X, np.array([3, 10], np.int32))
    expected = np.zeros_like(X)
    expected[3:10:2] = X[3:10:2]
    np.testing.assert_array_equal(out, expected)
    iterations = [r for r in log if r.opcode == "loop_iteration"]
    assert [r.file for r in iterations] == [__file__] * 4


def _count_down(x, count):
    """Adds x `count` times."""
    total, tile, left, one = sbuf(x.shape), load(x), load(count), sbuf((1, 1), nl.int32)
    nisa.memset(total, 0)
    nisa.memset(one, 1)
    register = nisa.register_alloc(0)
    nisa.register_move(register, 5)
    nisa.register_load(register, left)

    def body(r):
        nisa.tensor_tensor(total, total, tile, nl.add)
        nisa.tensor_tensor(left, left, one, nl.subtract)
        nisa.register_load(r, left)
        return r

    nl.while_loop(register, body)
    seen = sbuf((1, 1), nl.int32)
    nisa.register_store(seen, register)
    return store(total), store(seen)


def test_while_loop_and_parser_loops():
    total, seen = run(_count_down, X, np.array([[3]], np.int32))
    np.testing.assert_array_equal(total, X + X + X)
    assert seen == 3, "the body's register is passed by value"
    assert not run(_count_down, X, np.array([[0]], np.int32))[0].any()

    def parser(x):
        out, register = sbuf((64, 48)), nisa.register_alloc(2)
        store_rows = nl.ndarray((64, 48), nl.float32, nl.shared_hbm)
        nisa.dma_copy(store_rows, x)
        for i in nl.dynamic_range(register, 6):
            row = x.ap([[48, 1], [1, 48]], scalar_offset=i, indirect_dim=0)
            to = store_rows.ap([[48, 1], [1, 48]], scalar_offset=i, indirect_dim=0)
            nisa.dma_copy(to, row)
        nisa.dma_copy(out, store_rows)
        while register:
            nisa.dma_copy(out[0:2], x[0:2])
            nisa.register_move(register, 0)
        return store(out[0:6])

    np.testing.assert_array_equal(run(parser, X), X[:6])


def test_the_older_spellings_of_loops_are_deprecated():
    def for_loop(x):
        for _ in nl.dynamic_range(2):  # old
            load(x)

    def while_loop(x):
        register = nisa.register_alloc(1)
        while register:  # old
            nisa.register_move(register, 0)

    def newer(x):
        nl.fori_loop(0, 2, lambda i: None)
        nl.while_loop(nisa.register_alloc(0), lambda register: register)

    for kernel, instead in ((for_loop, "nl.fori_loop"), (while_loop, "nl.while_loop")):
        with pytest.warns(DeprecationWarning, match=instead) as seen:
            run(kernel, X)
        [warning] = [w for w in seen if w.category is DeprecationWarning]
        assert "# old" in linecache.getline(warning.filename, warning.lineno)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        run(newer, X)


def test_endless_while_loops_are_rejected(monkeypatch):
    def parser(x):
        register = nisa.register_alloc(1)
        while register:  # bad
            pass

    def same(x):
        nl.while_loop(nisa.register_alloc(1), lambda r: r)  # bad

    def never_zero(x):
        def body(r):
            nisa.register_move(r, 2)
            return r

        nl.while_loop(nisa.register_alloc(1), body)  # bad

    def parser_never_zero(x):
        register = nisa.register_alloc(1)
        while register:  # bad
            nisa.register_move(register, 2)

    monkeypatch.setattr("nxd_cp.simulators.nki_api.registers.MAX_ITERATIONS", 50)
    for kernel in (parser, same, never_zero, parser_never_zero):
        rejects("loop.endless", kernel, X)


def test_values_known_on_the_device_only_are_not_compared():
    def register(x):
        assert nisa.register_alloc(3) != None  # noqa: E711, NKI has no `is`
        if nisa.register_alloc(3) == 3:
            return store(load(x))

    def tile(x):
        assert load(x) != None  # noqa: E711
        return x if load(x) == 0.0 else store(load(x))

    for kernel in (register, tile):
        with pytest.raises(TypeError, match="not known while a kernel is built"):
            run(kernel, X)


def test_register_and_loop_rules():
    def unwritten(x):
        nl.fori_loop(0, nisa.register_alloc(), lambda i: None)  # bad

    def step(x):
        nl.fori_loop(0, 4, lambda i: None, step=0)  # bad

    def no_register(x):
        nl.while_loop(nisa.register_alloc(1), lambda r: None)  # bad

    def floats(x):
        nisa.register_load(nisa.register_alloc(), load(x[0:1, 0:1]))  # bad

    def ordered(x):
        with nl.no_reorder():
            nl.fori_loop(0, 4, lambda i: None)  # bad

    def written(x):
        nl.fori_loop(0, 2, lambda i: nisa.register_move(i, 0))  # bad

    def returned(x):
        nl.fori_loop(0, 2, lambda i: i)  # bad

    rejects("register.loop_variable", written, X)
    rejects("loop.bounds", returned, X)
    rejects("register.operands", unwritten, X)
    rejects("loop.bounds", step, X)
    rejects("loop.bounds", no_register, X)
    rejects("register.operands", floats, X)
    rejects("no_reorder.loop", ordered, X)
    with pytest.raises(TypeError, match="not known"):
        run(lambda x: range(nisa.register_alloc(3)), X)


def test_shape_only_mode_takes_addresses_as_zero_and_refuses_loops_over_memory():
    with parameters(SimParams(values=False)), record() as log:
        assert run(_gather(), X, ROWS + 1000).shape == (32, 48)
        with pytest.raises(NkiUnsupportedError, match="shape-only"):
            Kernel(_count_down, "gen3")(X, np.array([[3]], np.int32))
    assert any(r.flags == flags.DYNAMIC for r in log)


def test_the_other_dims_of_a_gathered_tensor_can_be_viewed():
    def kernel(x, rows):
        out = sbuf((32, 4, 8))
        gathered = x.reshape((64, 6, 8)).vector_select(0, load(rows))
        assert gathered.is_indirect()
        assert gathered[:, 1:5].is_indirect()
        nisa.dma_copy(out, gathered[:, 1:5, :])
        swapped = sbuf((32, 8, 4))
        nisa.dma_copy(swapped, gathered[:, 1:5, :].permute((0, 2, 1)))
        return store(out), store(swapped)

    out, swapped = run(kernel, X, ROWS)
    expected = X.reshape(64, 6, 8)[ROWS[:, 0], 1:5]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(swapped, expected.transpose(0, 2, 1))
