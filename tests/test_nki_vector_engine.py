"""VectorE instructions: fp32 arithmetic rounded once, bit patterns for bitvec, and their rules."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, psum, rejects, run, sbuf, store

X, Y = normal(128, 64), normal(128, 64, seed=1)
V = normal(128, 1, seed=2)
BF16 = ml_dtypes.bfloat16


def _binary(op, dst_dtype=None, **options):
    def kernel(x, y):
        dst = sbuf(x.shape, dst_dtype or x.dtype)
        nisa.tensor_tensor(dst, load(x), load(y), op, **options)  # bad
        return store(dst)

    return kernel


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (nl.add, X + Y),
        (nl.subtract, X - Y),
        (nl.multiply, X * Y),
        (nl.maximum, np.maximum(X, Y)),
        (nl.minimum, np.minimum(X, Y)),
        (nl.greater, X > Y),
        (nl.less_equal, X <= Y),
        (nl.abs_max, np.maximum(np.abs(X), np.abs(Y))),
        (nl.logical_and, (X != 0) & (Y != 0)),
    ],
)
def test_elementwise_operators(op, expected):
    found = run(_binary(op), X, Y, generation="gen4")
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_bf16_arithmetic_rounds_once():
    x, y = X.astype(BF16), Y.astype(BF16)
    expected = (x.astype(np.float32) * y.astype(np.float32)).astype(BF16)
    got = run(_binary(nl.multiply), x, y)
    assert got.dtype == BF16
    assert (got == expected).all()


def test_32_bit_integers_are_exact_on_gpsimd_and_fp32_on_vector():
    x = np.full((128, 8), 2**30 + 1, np.int32)
    y = np.full((128, 8), 1, np.int32)
    assert (run(_binary(nl.add), x, y) == 2**30 + 2).all()
    assert (run(_binary(nl.add, engine=nisa.engine.vector), x, y) == 2**30).all()


def test_bitvec_operators_work_on_bits_and_refuse_floats():
    x = np.arange(128 * 8, dtype=np.int32).reshape(128, 8)
    assert (run(_binary(nl.bitwise_xor), x, x * 3) == (x ^ (x * 3))).all()
    rejects("vector.bitvec", _binary(nl.bitwise_and), X, Y)


def test_shapes_must_agree():
    def kernel(x):
        nisa.tensor_tensor(sbuf((128, 64)), load(x), load(x[:, 0:32]), nl.add)  # bad

    rejects("operand.shapes", kernel, X)


def test_two_psum_inputs_are_caught():
    def kernel(x):
        a, b = psum(x.shape), psum(x.shape)
        nisa.tensor_copy(a, load(x))
        nisa.tensor_copy(b, load(x))
        nisa.tensor_tensor(sbuf(x.shape), a, b, nl.add)  # bad

    rejects("vector.inputs_in_psum", kernel, X)


def test_an_activation_function_is_no_elementwise_operator():
    rejects("operand.op", _binary(nl.exp), X, Y)


@pytest.mark.parametrize(("rows", "start"), [(64, 32), (96, 32), (32, 16), (128, 1)])
def test_partition_starts(rows, start):
    def kernel(x):
        tile = load(x)
        view = tile[start : min(128, start + rows)]
        nisa.tensor_copy(sbuf(view.shape), view)  # bad

    if start + rows <= 128:
        rejects("operand.partition_start", kernel, X)
    else:
        rejects("operand.partition_start", kernel, X[:, :1])


def test_legal_partition_starts_move_data_between_quadrants():
    def kernel(x):
        tile, out = load(x), sbuf((128, 64))
        nisa.tensor_copy(out[0:64], tile[64:128])
        nisa.tensor_copy(out[64:96], tile[32:64])
        nisa.tensor_copy(out[96:128], tile[0:32])
        return store(out)

    np.testing.assert_array_equal(run(kernel, X), np.concatenate([X[64:], X[32:64], X[:32]]))


def test_hbm_operands_are_caught():
    def kernel(x):
        nisa.tensor_copy(sbuf(x.shape), x)  # bad

    rejects("operand.tile", kernel, X)


def _scalar(op0, operand0, dst_dtype=None, **options):
    def kernel(x, v):
        vector = load(v)
        chosen = {k: vector if o == "v" else o for k, o in options.items()}
        dst = sbuf(x.shape, dst_dtype or x.dtype)
        first = vector if operand0 == "v" else operand0
        nisa.tensor_scalar(dst, load(x), op0, first, **chosen)  # bad
        return store(dst)

    return kernel


def test_tensor_scalar():
    def same(kernel, expected):
        np.testing.assert_array_equal(run(kernel, X, V), expected)

    same(_scalar(nl.multiply, 2.0), X * np.float32(2))
    same(_scalar(nl.multiply, "v"), X * V)
    same(_scalar(nl.subtract, "v", reverse0=True), V - X)
    same(_scalar(nl.multiply, "v", op1=nl.add, operand1=0.5), X * V + np.float32(0.5))
    same(_scalar(nl.add, 1.0, op1=nl.subtract, operand1="v", reverse1=True), V - (X + 1))
    same(_scalar(nl.abs, None), np.abs(X))


def test_tensor_scalar_does_not_change_its_input():
    def kernel(x):
        tile, out = load(x), sbuf(x.shape)
        nisa.tensor_scalar(out, tile, nl.bypass, None, op1=nl.multiply, operand1=2.0)
        return store(tile), store(out)

    same, double = run(kernel, X)
    assert (same == X).all()
    assert (double == 2 * X).all()


def test_tensor_scalar_rules():
    rejects("operand.per_partition", _scalar(nl.multiply, "v"), X, V.astype(BF16))
    rejects("operand.per_partition", _scalar(nl.multiply, "v"), X, Y)
    rejects("tensor_scalar.operands", _scalar(nl.multiply, 1.0, operand1=2.0), X, V)
    rejects("operand.unary", _scalar(nl.abs, 2.0), X, V)
    scalar = _scalar(nl.subtract, 1.0, engine=nisa.engine.scalar)
    rejects("tensor_scalar.scalar_engine", scalar, X, V)
    rejects("tensor_scalar.scalar_engine", scalar, X, V, generation="gen2")
    rejects("vector.engine", _scalar(nl.multiply, 1.0, engine=nisa.engine.gpsimd), X, V)


def test_shifts_and_masks_of_integers():
    x = np.arange(128 * 8, dtype=np.uint32).reshape(128, 8)
    got = run(_scalar(nl.left_shift, 3, op1=nl.bitwise_and, operand1=0xFF), x, V)
    assert (got == ((x << 3) & 0xFF)).all()
    rejects("vector.bitvec", _scalar(nl.left_shift, 3, op1=nl.add, operand1=1), x, V)


def test_scalar_tensor_tensor():
    def kernel(x, y, v):
        a, b, c = load(x), load(y), load(v)
        first, second = sbuf(x.shape), sbuf(x.shape)
        nisa.scalar_tensor_tensor(first, a, nl.multiply, c, nl.add, b)
        nisa.scalar_tensor_tensor(second, a, nl.multiply, 2.0, nl.subtract, b, reverse1=True)
        return store(first), store(second)

    first, second = run(kernel, X, Y, V)
    np.testing.assert_array_equal(first, X * V + Y)
    np.testing.assert_array_equal(second, Y - X * 2)
    v = V.astype(ml_dtypes.bfloat16)  # operand0 may be of any dtype here, unlike tensor_scalar's
    np.testing.assert_array_equal(run(kernel, X, Y, v)[0], X * v.astype(np.float32) + Y)


def test_scalar_tensor_tensor_takes_one_psum_input_at_most():
    def kernel(x):
        a, b = psum(x.shape), psum(x.shape)
        nisa.tensor_copy(a, load(x))
        nisa.tensor_copy(b, load(x))
        nisa.scalar_tensor_tensor(sbuf(x.shape), a, nl.multiply, 1.0, nl.add, b)  # bad

    rejects("vector.inputs_in_psum", kernel, X)


def _reduce(op, axis, shape, **options):
    def kernel(x):
        dst = sbuf(shape, x.dtype)
        nisa.tensor_reduce(dst, op, load(x), axis, **options)  # bad
        return store(dst)

    return kernel


def test_tensor_reduce():
    x = normal(128, 4, 6)
    assert (run(_reduce(nl.maximum, 2, (128, 4)), x) == x.max(2)).all()
    got = run(_reduce(nl.maximum, (1, 2), (128, 1), negate=True), x)
    assert (got[:, 0] == -x.max((1, 2))).all()
    got = run(_reduce(nl.add, -1, (128, 4, 1), keepdims=True), x)
    np.testing.assert_allclose(got[..., 0], x.sum(2), atol=1e-5)
    ones = np.ones((128, 300), BF16)
    assert (run(_reduce(nl.add, 1, (128, 1)), ones) == 300).all(), "sums run in fp32"


def test_tensor_reduce_rules():
    x = normal(128, 4, 6)
    rejects("tensor_reduce.axis", _reduce(nl.add, 1, (128, 6)), x)
    rejects("tensor_reduce.axis", _reduce(nl.add, (0, 1, 2), (128, 1)), x)
    rejects("tensor_reduce.axis", _reduce(nl.add, 2, (128, 5)), x)
    rejects("operand.op", _reduce(nl.power, 2, (128, 4)), x)


def test_copies_cast_and_keep_bits():
    def kernel(x, dtype):
        dst = sbuf(x.shape, dtype)
        nisa.tensor_copy(dst, load(x))
        return store(dst)

    assert (run(kernel, X, nl.bfloat16) == X.astype(BF16)).all()
    halves = np.array([[0.5, 1.5, -2.5, 1e9]] * 128, np.float32)
    assert run(kernel, halves, nl.int8)[0].tolist() == [0, 2, -2, 127]
    big = np.full((128, 4), 2**24 + 1, np.int32)
    assert (run(kernel, big, nl.int32) == big).all()


def test_engines_that_cannot_copy_are_caught():
    def on(engine, from_psum):
        def kernel(x):
            src = load(x)
            if from_psum:
                src = psum(x.shape)
                nisa.tensor_copy(src, load(x))
            nisa.tensor_copy(sbuf(x.shape), src, engine=engine)  # bad

        return kernel

    rejects("instruction.generation", on(nisa.engine.scalar, False), X, generation="gen2")
    rejects("vector.engine", on(nisa.engine.gpsimd, True), X)
    rejects("vector.engine", on(nisa.engine.tensor, False), X)
    run(on(nisa.engine.scalar, True), X, generation="gen3")


def test_memset_and_reciprocal():
    def kernel(x):
        filled, inverse = sbuf(x.shape), sbuf(x.shape)
        nisa.memset(filled, -1e30)
        nisa.reciprocal(inverse, load(x))
        return store(filled), store(inverse)

    filled, inverse = run(kernel, X)
    assert (filled == np.float32(-1e30)).all()
    assert (inverse == 1 / X).all()


def test_memset_of_a_value_the_dtype_does_not_have_is_caught():
    def kernel():
        nisa.memset(nl.ndarray((128, 4), dtype=nl.uint8), 300)  # bad

    rejects("memset.value", kernel)
