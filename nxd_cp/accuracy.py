"""How large an error may be. Computed from data: fp64 truth, and the same maths on one device.

Does: measure errors and say in words when one is over its budget. Does not: assert (tests and the
benchmark do what they must with the words).

fp32 has fixed bounds for unit-variance inputs. Every other bound is a multiple of the error that an
accepted one-device implementation makes on the same data in the same dtype, plus one rounding step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP32_OUTPUT = 1e-5  # absolute, unit-variance inputs
FP32_GRADIENT = 1e-4
RMS_FACTOR = 2.0  # of the one-device relative RMS error
MAX_FACTOR = 4.0  # of the one-device largest absolute error


@dataclass(frozen=True)
class Error:
    """Error of a tensor against fp64 truth."""

    relative_rms: float
    max_abs: float
    where: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        return (
            f"relative RMS {self.relative_rms:.3e}, max {self.max_abs:.3e} at {self.where} "
            f"({self.got:.7g}, truth {self.expected:.7g})"
        )


def error(actual: Tensor, truth: Tensor) -> Error:
    """Measure `actual` against `truth` (fp64). A NaN anywhere makes both errors NaN."""
    assert truth.dtype == torch.float64, f"truth is fp64, got {truth.dtype}"
    assert actual.shape == truth.shape, f"expected {tuple(truth.shape)}, got {tuple(actual.shape)}"
    difference = actual.double() - truth
    rms = difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-300)
    flat = int(difference.abs().argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), truth.shape))
    return Error(
        float(rms),
        float(difference.abs().max()),
        where,
        float(actual[where]),
        float(truth[where]),
    )


def rounding_step(truth: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest value: what one rounding may add."""
    return float(truth.abs().max()) * torch.finfo(dtype).eps / 2


def over_bound(actual: Tensor, truth: Tensor, bound: float) -> str:
    """ "" when the largest absolute error is at most `bound`, else what it is; a NaN is over."""
    found = error(actual, truth)
    return "" if found.max_abs <= bound else f"{found}, expected max <= {bound:.1e}"


def over_budget(actual: Tensor, truth: Tensor, baseline: Tensor) -> str:
    """ "" when `actual` is about as good as `baseline`, the same maths on one device in its dtype.

    Relative RMS error at most twice, largest error at most four times that of the baseline, plus
    one rounding step of the baseline's dtype. Otherwise the sentence that says by how much not.
    """
    found, allowed = error(actual, truth), error(baseline, truth)
    step = rounding_step(truth, baseline.dtype)
    rms_step = torch.finfo(baseline.dtype).eps / 4
    if not found.relative_rms <= RMS_FACTOR * allowed.relative_rms + rms_step:
        return f"{found}; one device: {allowed}; expected at most {RMS_FACTOR} x its RMS"
    if not found.max_abs <= MAX_FACTOR * allowed.max_abs + step:
        return f"{found}; one device: {allowed}; expected at most {MAX_FACTOR} x its maximum"
    return ""
