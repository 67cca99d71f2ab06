"""Operators: what `op=nl.add`, `op=nl.exp` and so on mean to an instruction.

Each `Op` says which roles it can play: binary ALU operator, unary ALU operator, reduction,
activation function. Arithmetic is fp32 and comparisons give 1.0 or 0.0; bitvec operators work on
integer bit patterns. Activation functions are exact here, polynomials on the device; sin alone
goes wrong outside its valid range as documented.
Calling one on tiles (`nl.add(x, y)`) issues instructions: functions/elementwise.py.

Source: nki.api.shared, "Supported Math Operators" and "Supported Activation Functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .arguments import SYMPTOMS, explain

F32 = np.float32


class Op:
    """One operator. `binary(a, b, out)`, `unary(a, out)`, `activate(a, out)`; None if it cannot.

    since: the first generation that has it. valid: the valid input range of the activation (of |x|
    for reciprocal).
    """

    __slots__ = ("activate", "binary", "bitvec", "name", "reduce", "since", "unary", "valid")

    def __init__(
        self,
        name: str,
        *,
        binary: Callable[..., Any] | None = None,
        unary: Callable[..., Any] | None = None,
        activate: Callable[..., Any] | None = None,
        reduce: Any = None,
        bitvec: bool = False,
        valid: tuple[float, float] | None = None,
        since: int = 2,
    ) -> None:
        self.name = name
        self.binary = binary
        self.unary = unary
        self.activate = activate
        self.reduce = reduce
        self.bitvec = bitvec
        self.valid = valid
        self.since = since

    def __repr__(self) -> str:
        return f"nl.{self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """This operator on tiles, as a function of nki.language (see functions/)."""
        from .functions.elementwise import apply  # functions issue instructions, made of operators

        try:
            return apply(self, *args, **kwargs)
        except SYMPTOMS as error:
            explain(error, f"nki.language.{self.name}", args, kwargs)


def _compare(ufunc: Any) -> Callable[..., Any]:
    def apply(a: Any, b: Any, out: Any = None) -> Any:
        result = ufunc(a, b)
        if out is None:
            return result.astype(F32)
        out[...] = result
        return out

    return apply


def _of_abs(ufunc: Any) -> Callable[..., Any]:
    return lambda a, b, out=None: ufunc(np.abs(a), np.abs(b), out=out)


def _formula(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A unary function from an expression; writes into `out` when given."""

    def apply(a: Any, out: Any = None) -> Any:
        result = function(a)
        if out is None:
            return result
        out[...] = result
        return out

    return apply


def _erf(x: Any) -> Any:
    """Abramowitz-Stegun has 1e-7 error; math.erf is exact, so use it element by element."""
    return np.frompyfunc(math.erf, 1, 1)(x).astype(F32)


def _sigmoid(x: Any) -> Any:
    return F32(1) / (F32(1) + np.exp(-x))


def _softplus(x: Any) -> Any:
    return np.logaddexp(x, F32(0))


def _copy(a: Any, out: Any = None) -> Any:
    return np.positive(a, out=out)


def _relu(a: Any, out: Any = None) -> Any:
    return np.maximum(a, F32(0), out=out)


def _rsqrt(x: Any) -> Any:
    return F32(1) / np.sqrt(x)


_PI = F32(math.pi)


def _sin(a: Any, out: Any = None) -> Any:
    """sin(a) within [-pi, pi]; beyond, a cubic, as ScalarE does not reduce its argument.

    The cubic is that of sin at the nearer end, -d + d^3 / 6 for d beyond pi. Our reading: it has
    the documented sin(9) = 27.65.
    """
    beyond = np.abs(a) - _PI
    far = beyond > 0
    cubic = np.sign(a) * beyond * (beyond * beyond / F32(6) - F32(1)) if far.any() else None
    values = np.sin(a, out=out)
    if cubic is not None:
        np.copyto(values, cubic, where=far)
    return values


_SQRT_2_PI = F32(math.sqrt(2 / math.pi))
_TWO_RSQRT_PI = F32(2 / math.sqrt(math.pi))


def _gelu_tanh(x: Any) -> Any:
    return F32(0.5) * x * (F32(1) + np.tanh(_SQRT_2_PI * (x + F32(0.044715) * x * x * x)))


def _gelu_dx(x: Any) -> Any:
    cdf = F32(0.5) * (F32(1) + _erf(x * F32(math.sqrt(0.5))))
    return cdf + x * np.exp(F32(-0.5) * x * x) * F32(1 / math.sqrt(2 * math.pi))


def _silu_dx(x: Any) -> Any:
    s = _sigmoid(x)
    return s * (F32(1) + x * (F32(1) - s))


def _sigmoid_gelu_dx(x: Any) -> Any:
    s = _sigmoid(F32(1.702) * x)
    return s * (F32(1) + F32(1.702) * x * (F32(1) - s))


_WIDE = (2.0**-64, 2.0**64)
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("add", binary=np.add, reduce=np.add),
        Op("subtract", binary=np.subtract, reduce=np.subtract),
        Op("multiply", binary=np.multiply, reduce=np.multiply),
        Op("maximum", binary=np.maximum, reduce=np.maximum),
        Op("minimum", binary=np.minimum, reduce=np.minimum),
        Op("max", binary=np.maximum, reduce=np.maximum),
        Op("min", binary=np.minimum, reduce=np.minimum),
        Op("divide", binary=np.divide),
        Op("fmod"),  # in no engine: nki.language.fmod says so
        Op("mod"),
        Op("power", binary=np.power),
        Op("abs_max", binary=_of_abs(np.maximum), since=4),
        Op("abs_min", binary=_of_abs(np.minimum), since=4),
        Op("equal", binary=_compare(np.equal)),
        Op("not_equal", binary=_compare(np.not_equal)),
        Op("greater_equal", binary=_compare(np.greater_equal)),
        Op("greater", binary=_compare(np.greater)),
        Op("less_equal", binary=_compare(np.less_equal)),
        Op("less", binary=_compare(np.less)),
        Op("logical_and", binary=_compare(np.logical_and), reduce=np.logical_and),
        Op("logical_or", binary=_compare(np.logical_or), reduce=np.logical_or),
        Op("logical_xor", binary=_compare(np.logical_xor), reduce=np.logical_xor),
        Op("bitwise_and", binary=np.bitwise_and, reduce=np.bitwise_and, bitvec=True),
        Op("bitwise_or", binary=np.bitwise_or, reduce=np.bitwise_or, bitvec=True),
        Op("bitwise_xor", binary=np.bitwise_xor, reduce=np.bitwise_xor, bitvec=True),
        Op("left_shift", binary=np.left_shift, bitvec=True),
        Op("right_shift", binary=np.right_shift, bitvec=True),
        Op("invert", unary=np.invert, bitvec=True),
        Op("bypass", unary=_copy),
        Op("copy", activate=_copy),
        Op("abs", unary=np.abs, activate=np.abs),
        Op("square", unary=np.square, activate=np.square),
        Op("relu", unary=_relu, activate=_relu),
        Op("rsqrt", unary=_formula(_rsqrt), activate=_formula(_rsqrt), valid=(2.0**-87, 2.0**97)),
        Op("reciprocal", unary=np.reciprocal, activate=np.reciprocal, valid=(2.0**-42, 2.0**42)),
        Op("exp", activate=np.exp),
        Op("log", activate=np.log, valid=_WIDE),
        Op("sqrt", activate=np.sqrt, valid=(2.0**-116, 2.0**118)),
        Op("tanh", activate=np.tanh),
        Op("sigmoid", activate=_formula(_sigmoid)),
        Op("silu", activate=_formula(lambda x: x * _sigmoid(x))),
        Op("silu_dx", activate=_formula(_silu_dx)),
        Op("softplus", activate=_formula(_softplus)),
        Op("mish", activate=_formula(lambda x: x * np.tanh(_softplus(x)))),
        Op("erf", activate=_formula(_erf)),
        Op("erf_dx", activate=_formula(lambda x: _TWO_RSQRT_PI * np.exp(-x * x))),
        Op(
            "gelu", activate=_formula(lambda x: F32(0.5) * x * (F32(1) + _erf(x * F32(0.70710678))))
        ),
        Op("gelu_dx", activate=_formula(_gelu_dx)),
        Op("gelu_apprx_tanh", activate=_formula(_gelu_tanh)),
        Op("gelu_apprx_sigmoid", activate=_formula(lambda x: x * _sigmoid(F32(1.702) * x))),
        Op("gelu_apprx_sigmoid_dx", activate=_formula(_sigmoid_gelu_dx)),
        Op("sign", activate=np.sign),
        Op("sin", activate=_sin, valid=(-math.pi, math.pi)),
        Op("arctan", activate=np.arctan, valid=(-math.pi / 2, math.pi / 2)),
        Op("prelu", activate=_relu),
        Op("average"),  # nisa.tensor_partition_reduce alone
    )
}
