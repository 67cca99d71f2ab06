"""Predicated copies, select_reduce, range_select and the reduce registers they share."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api.isa.select import FP32_MIN

X, Y = normal(128, 4, 8), normal(128, 4, 8, seed=1)
MASK = (normal(128, 4, 8, seed=2) > 0).astype(np.uint8)
LOW = np.arange(128, dtype=np.float32).reshape(128, 1) % 20
HIGH = LOW + 9


@pytest.mark.parametrize("reverse", [False, True])
def test_a_predicated_copy_leaves_the_rest(reverse):
    def kernel(x, y, mask):
        out = load(y)
        nisa.tensor_copy_predicated(out, load(x), load(mask.reshape((128, 32))), reverse)
        return store(out)

    expected = np.where((MASK == 0) if reverse else MASK, X, Y)
    np.testing.assert_array_equal(run(kernel, X, Y, MASK), expected)


def test_a_predicated_scalar_is_rounded_to_dst():
    def kernel(x, mask):
        out = load(x)
        nisa.tensor_copy_predicated(out, 1.001, load(mask))
        return store(out)

    x = X.astype(ml_dtypes.bfloat16)
    expected = np.where(MASK, ml_dtypes.bfloat16(1.001), x)
    assert (run(kernel, x, MASK) == expected).all()


def test_two_complementary_predicated_copies_write_everything_and_one_does_not():
    def kernel(x, mask, both):
        out, tile, where = sbuf(x.shape), load(x), load(mask)
        nisa.tensor_copy_predicated(out, tile, where)
        if both:
            nisa.tensor_copy_predicated(out, tile, where, reverse_pred=True)
        copy = sbuf(x.shape)
        nisa.activation(copy, nl.copy, out)  # bad
        return store(copy)

    np.testing.assert_array_equal(run(kernel, X, MASK, True), X)
    rejects("memory.uninitialised", kernel, X, MASK, False)


def test_predicate_rules():
    def typed(x, mask):
        nisa.tensor_copy_predicated(load(x), load(x), load(mask))  # bad

    def both_in_psum(x, mask):
        a, b = psum(x.shape), psum(x.shape, nl.uint8)
        nisa.tensor_copy(a, load(x))
        nisa.tensor_copy(b, load(mask))
        nisa.tensor_copy_predicated(sbuf(x.shape), a, b)  # bad

    def cast(x, mask):
        nisa.tensor_copy_predicated(sbuf(x.shape, nl.bfloat16), load(x), load(mask))  # bad

    rejects("select.predicate", typed, X, MASK.astype(np.int8))
    rejects("select.predicate", both_in_psum, X, MASK)
    rejects("select.dtype", cast, X, MASK)


@pytest.mark.parametrize("reverse", [False, True])
def test_select_reduce(reverse):
    def kernel(x, mask, fill):
        out, top = sbuf(x.shape), sbuf((128, 1))
        command = nisa.reduce_cmd.reset_reduce
        nisa.select_reduce(
            out, load(mask), load(x), load(fill), top, command, nl.maximum, reverse_pred=reverse
        )
        return store(out), store(top)

    out, top = run(kernel, X, MASK, HIGH)
    expected = np.where((MASK == 0) if reverse else MASK, X, HIGH[:, :, None])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(top, expected.max(axis=(1, 2))[:, None])


def test_select_reduce_refuses_wide_types():
    def wide(x, mask):
        nisa.select_reduce(sbuf(x.shape), load(mask), load(x), 0.0)  # bad

    rejects("select.dtype", wide, X.astype(np.int32), MASK)
    rejects("select.predicate", wide, X, MASK.astype(np.uint32))


def _range(start=3, op=nl.maximum, fill=FP32_MIN, first=nl.greater_equal):
    def kernel(x, low, high):
        out, top = sbuf(x.shape), sbuf((128, 1))
        bounds = {"bound0": load(low), "bound1": load(high)}
        tile = load(x)
        nisa.range_select(  # bad
            out,
            tile,
            first,
            nl.less,
            **bounds,
            reduce_res=top,
            reduce_op=op,
            range_start=start,
            on_false_value=fill,
        )
        return store(out), store(top)

    return kernel


def test_range_select_keeps_an_interval_and_its_maximum():
    out, top = run(_range(), X, LOW, HIGH)
    index = 3 + np.arange(32).reshape(4, 8)
    keep = (index >= LOW[:, :, None]) & (index < HIGH[:, :, None])
    expected = np.where(keep, X, np.float32(FP32_MIN))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(top, expected.max(axis=(1, 2))[:, None])


def test_range_select_rules():
    rejects("instruction.generation", _range(), X, LOW, HIGH, generation="gen2")
    rejects("range_select.bounds", _range(fill=-9.0), X, LOW, HIGH)
    rejects("range_select.bounds", _range(start=2**24), X, LOW, HIGH)
    rejects("range_select.bounds", _range(first=nl.not_equal), X, LOW, HIGH)
    rejects("vector_reduce.command", _range(op=nl.add), X, LOW, HIGH)
    rejects("select.dtype", _range(), X, LOW.astype(ml_dtypes.bfloat16), HIGH)


def _chain(*commands, init=None):
    """tensor_scalar_reduce over two tiles, the second continuing the first."""

    def kernel(x, y):
        out, total = sbuf(x.shape), sbuf((128, 1))
        for tile, command, result in zip((load(x), load(y)), commands, (None, total), strict=True):
            first = init if command is nisa.reduce_cmd.load_reduce else None
            nisa.tensor_scalar_reduce(  # bad
                out, tile, nl.multiply, 2.0, nl.add, result, reduce_cmd=command, reduce_init=first
            )
        return store(out), store(total)

    return kernel


def test_reductions_continue_across_instructions():
    commands = nisa.reduce_cmd
    x, y = np.round(X * 8), np.round(Y * 8)  # small integers: every order of summation is exact
    sums = [2 * a.sum(axis=(1, 2))[:, None] for a in (x, y)]
    out, total = run(_chain(commands.reset_reduce, commands.reduce), x, y)
    np.testing.assert_array_equal(out, 2 * y)
    np.testing.assert_array_equal(total, sums[0] + sums[1])
    _, total = run(_chain(commands.load_reduce, commands.reduce, init=5.0), x, y)
    np.testing.assert_array_equal(total, 5 + sums[0] + sums[1])
    _, total = run(_chain(commands.reset_reduce, commands.reset_reduce), x, y)
    np.testing.assert_array_equal(total, sums[1])


def test_a_reduction_that_nothing_began_is_caught():
    commands = nisa.reduce_cmd
    rejects("vector_reduce.accumulator", _chain(commands.reduce, commands.reduce), X, Y)
    rejects("vector_reduce.command", _chain(commands.load_reduce, commands.reduce), X, Y)
    rejects("vector_reduce.accumulator", _selections(commands.idle, commands.reduce), X)
    rejects("vector_reduce.result", _selections(commands.reset_reduce, commands.idle), X)


def _selections(*commands):
    """select_reduce twice; the second gives a result."""

    def kernel(x):
        tile, out, total = load(x), sbuf(x.shape), sbuf((128, 1))
        mask = sbuf(x.shape, nl.uint8)
        nisa.memset(mask, 1)
        for command, result in zip(commands, (None, total), strict=True):
            nisa.select_reduce(out, mask, tile, 0.0, result, command)  # bad

    return kernel


def test_each_instruction_takes_its_own_reduce_commands():
    commands = nisa.reduce_cmd

    def exponential(x):
        nisa.exponential(sbuf(x.shape), load(x), reduce_cmd=commands.reset)  # bad

    for command in (commands.reset, commands.idle):
        rejects("vector_reduce.command", _chain(command, commands.reduce), X, Y)
    for command in (commands.reset, commands.load_reduce):
        rejects("vector_reduce.command", _selections(command, commands.reduce), X)
    rejects("vector_reduce.command", exponential, X, generation="gen4")


def test_a_negated_result_leaves_the_registers_alone():
    def kernel(x):
        tile, out = load(x), sbuf(x.shape)
        first, second = sbuf((128, 1)), sbuf((128, 1))
        nisa.tensor_scalar_reduce(
            out, tile, nl.add, 0.0, nl.max, reduce_res=first, reduce_res_negate=True
        )
        more = nisa.reduce_cmd.reduce
        nisa.tensor_scalar_reduce(out, tile, nl.add, 1.0, nl.max, second, reduce_cmd=more)
        return store(first), store(second)

    first, second = run(kernel, X)
    top = X.max(axis=(1, 2))[:, None]
    np.testing.assert_array_equal(first, -top)
    np.testing.assert_array_equal(second, (X + np.float32(1)).max(axis=(1, 2))[:, None])


def test_a_reversed_tensor_scalar_reduce_is_refused():
    def kernel(x):
        nisa.tensor_scalar_reduce(sbuf(x.shape), load(x), nl.add, 0.0, nl.add, reverse0=True)  # bad

    rejects("tensor_scalar_reduce.operators", kernel, X)
