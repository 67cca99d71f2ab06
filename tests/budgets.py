"""How large an error may be, as assertions; the rules and numbers are in nxd_cp/accuracy.py."""

from __future__ import annotations

from torch import Tensor

from nxd_cp.accuracy import (
    FP32_GRADIENT,
    FP32_OUTPUT,
    MAX_FACTOR,
    RMS_FACTOR,
    Error,
    error,
    over_bound,
    over_budget,
    rounding_step,
)

__all__ = [
    "FP32_GRADIENT",
    "FP32_OUTPUT",
    "HOPS_FACTOR",
    "MAX_FACTOR",
    "RMS_FACTOR",
    "Error",
    "assert_close",
    "assert_within_budget",
    "error",
    "rounding_step",
]

HOPS_FACTOR = 1.3  # error after up to 16 hops against that after one


def assert_close(name: str, actual: Tensor, truth: Tensor, bound: float) -> None:
    """The largest absolute error is at most `bound`; a NaN fails."""
    said = over_bound(actual, truth, bound)
    assert not said, f"{name}: {said}"


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """`actual` is about as good as `baseline`; see `nxd_cp.accuracy.over_budget`. Prints both."""
    print(
        f"{name}: {error(actual, truth)}\n{' ' * len(name)}  one device: {error(baseline, truth)}"
    )
    said = over_budget(actual, truth, baseline)
    assert not said, f"{name}: {said}"
