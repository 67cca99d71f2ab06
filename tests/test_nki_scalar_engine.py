"""activation: op(data * scale + bias) in fp32, the reduce registers, and the rules."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError, SimParams, parameters

X, V = normal(128, 64), normal(128, 1, seed=1)
CMD = nisa.reduce_cmd


def _activation(op, dst_dtype=None, **options):
    def kernel(x, v):
        vector = load(v)
        chosen = {k: vector if o == "v" else o for k, o in options.items()}
        dst = sbuf(x.shape, dst_dtype or x.dtype)
        nisa.activation(dst, op, load(x), **chosen)  # bad
        return store(dst)

    return kernel


def test_scale_and_bias_come_before_the_function():
    np.testing.assert_array_equal(run(_activation(nl.exp), X, V), np.exp(X))
    np.testing.assert_array_equal(
        run(_activation(nl.exp, scale=0.5), X, V), np.exp(X * np.float32(0.5))
    )
    np.testing.assert_array_equal(
        run(_activation(nl.exp, scale=0.5, bias="v"), X, V), np.exp(X * np.float32(0.5) + V)
    )
    np.testing.assert_array_equal(
        run(_activation(nl.square, scale="v", bias=1.0), X, V), np.square(X * V + 1)
    )
    np.testing.assert_array_equal(run(_activation(nl.copy), X, V), X)


def test_the_result_is_rounded_once_to_the_dtype_of_dst():
    got = run(_activation(nl.exp, dst_dtype=nl.bfloat16), X, V)
    assert (got == np.exp(X).astype(ml_dtypes.bfloat16)).all()


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (nl.tanh, np.tanh),
        (nl.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (nl.silu, lambda x: x / (1 + np.exp(-x))),
        (nl.relu, lambda x: np.maximum(x, 0)),
        (nl.softplus, lambda x: np.log1p(np.exp(x))),
    ],
)
def test_functions(op, function):
    expected = function(X.astype(np.float64))
    np.testing.assert_allclose(run(_activation(op), X, V), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["gelu", "silu", "erf", "gelu_apprx_sigmoid"])
def test_derivative_functions_are_derivatives(op):
    x = np.linspace(-3, 3, 128 * 4, dtype=np.float32).reshape(128, 4)
    step = 1e-2
    slope = (
        run(_activation(getattr(nl, op)), x + np.float32(step), V)
        - run(_activation(getattr(nl, op)), x - np.float32(step), V)
    ) / (2 * step)
    got = run(_activation(getattr(nl, f"{op}_dx")), x, V)
    np.testing.assert_allclose(got, slope, atol=1e-3)


def test_the_sum_is_taken_before_rounding_and_continues_over_instructions():
    def kernel(x):
        first, second = load(x[:, 0:32]), load(x[:, 32:64])
        out, total = sbuf((128, 32), nl.bfloat16), sbuf((128, 1))
        nisa.activation(out, nl.exp, first, reduce_op=nl.add, reduce_cmd=CMD.reset_reduce)
        nisa.activation(
            out, nl.exp, second, reduce_op=nl.add, reduce_cmd=CMD.reduce, reduce_res=total
        )
        return store(total)

    np.testing.assert_allclose(run(kernel, X)[:, 0], np.exp(X).sum(1), rtol=1e-5)


def test_activation_reduce_starts_anew():
    def kernel(x):
        out, total = sbuf(x.shape), sbuf((128, 1))
        for _ in range(2):
            nisa.activation_reduce(out, nl.copy, load(x), nl.add, total)
        return store(total)

    np.testing.assert_allclose(run(kernel, X)[:, 0], X.sum(1), atol=1e-4)


def test_rules():
    rejects("operand.op", _activation(nl.add), X, V)
    rejects("activation.bias", _activation(nl.exp, bias=1.0), X, V, generation="gen2")
    rejects("activation.bias", _activation(nl.reciprocal, bias="v"), X, V, generation="gen2")
    rejects("activation.scale", _activation(nl.exp, scale="v"), X, V.astype(ml_dtypes.bfloat16))
    rejects(
        "activation.accumulator", _activation(nl.exp, reduce_op=nl.add, reduce_cmd=CMD.reduce), X, V
    )
    rejects(
        "activation.reduce",
        _activation(nl.exp, reduce_op=nl.maximum, reduce_cmd=CMD.reset_reduce),
        X,
        V,
    )
    run(_activation(nl.exp, bias=1.0), X, V, generation="gen3")
    run(_activation(nl.exp, bias="v"), X, V.astype(ml_dtypes.bfloat16), generation="gen2")


def test_arguments_outside_the_valid_range_warn_and_raise_when_strict():
    zero = np.zeros((128, 4), np.float32)
    with pytest.warns(NkiSimulatorWarning, match=r"activation\.range"):
        run(_activation(nl.log), zero, V)
    with parameters(SimParams(strict=True)), pytest.raises(NkiValidationError, match="range"):
        run(_activation(nl.log), zero, V)
