"""What scripts that print their result but do not judge it should have computed.

Each check gets the script's module namespace after it ran as __main__. References are NumPy or
torch on the script's own inputs; 16-bit results are compared exactly or to one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Check = Callable[[dict[str, Any]], None]


def _same(actual: Any, expected: Any, rtol: float = 0.0) -> None:
    got = np.asarray(actual.float() if hasattr(actual, "float") else actual, np.float64)
    want = np.asarray(expected.float() if hasattr(expected, "float") else expected, np.float64)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0.0)


def sum_of_inputs(names: dict[str, Any]) -> None:
    """c = a + b."""
    _same(names["c"], names["a"] + names["b"])


def exponential(names: dict[str, Any]) -> None:
    """out_tensor = exp(in_tensor), to one bfloat16 rounding."""
    _same(names["out_tensor"], names["in_tensor"].double().exp(), rtol=2.0**-8)


def even_and_odd(names: dict[str, Any]) -> None:
    """Columns split by parity."""
    _same(names["out1_tensor"], names["in_tensor"][:, 0::2])
    _same(names["out2_tensor"], names["in_tensor"][:, 1::2])


def max_pool(names: dict[str, Any]) -> None:
    """2-D max pooling."""
    import torch

    size = names["POOL_SIZE"]
    _same(
        names["out_tensor"], torch.nn.functional.max_pool2d(names["in_tensor"].float(), size, size)
    )


def tile_addition(names: dict[str, Any]) -> None:
    """The addition tutorial's kernel, which has no inputs of its own, on 256 x 1024 bfloat16."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand((256, 1024), generator=generator).bfloat16() for _ in range(2))
    _same(names["nki_tensor_add"](a, b), a + b)


def attention(version: str, seq_len: int, dtype: str) -> Check:
    """A check of one kernel of the attention tutorial, with its test's inputs and tolerance."""

    def check(names: dict[str, Any]) -> None:
        rng = np.random.RandomState(42)
        q, k, v = (rng.rand(128, seq_len).astype(np.dtype(dtype)) for _ in range(3))
        scores = q.T.astype(np.float64) @ k.astype(np.float64)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = weights / weights.sum(axis=1, keepdims=True) @ v.T.astype(np.float64)
        got = np.asarray(names[version](q, k, v), np.float64)
        np.testing.assert_allclose(got, expected, atol=1e-2, rtol=1e-2)

    return check
