"""How large an error may be. Computed from data: fp64 truth, and the same maths on one device.

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
HOPS_FACTOR = 1.3  # error after 16 hops against that after 2


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


def assert_close(name: str, actual: Tensor, truth: Tensor, bound: float) -> None:
    """The largest absolute error is at most `bound`; a NaN fails."""
    found = error(actual, truth)
    assert found.max_abs <= bound, f"{name}: {found}, expected max <= {bound:.1e}"


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """`actual` is about as good as `baseline`, the same maths on one device in the same dtype.

    Relative RMS error at most twice, largest error at most four times that of the baseline, plus
    one rounding step of the baseline's dtype. Both errors are printed.
    """
    found, allowed = error(actual, truth), error(baseline, truth)
    step = rounding_step(truth, baseline.dtype)
    print(f"{name}: {found}\n{' ' * len(name)}  one device: {allowed}")
    rms_step = torch.finfo(baseline.dtype).eps / 4
    assert found.relative_rms <= RMS_FACTOR * allowed.relative_rms + rms_step, (
        f"{name}: {found}; one device: {allowed}; expected at most {RMS_FACTOR} x its RMS"
    )
    assert found.max_abs <= MAX_FACTOR * allowed.max_abs + step, (
        f"{name}: {found}; one device: {allowed}; expected at most {MAX_FACTOR} x its maximum"
    )
