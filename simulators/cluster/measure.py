"""Kernel times for the ring from the kernels themselves: run in the simulator, timed, extrapolated.

Does: run nxd_cp's flash attention kernels on zeros at small sizes and hand their estimated times to
`Timed`. Does not: run anything on a device. Needs NumPy and ml_dtypes.

Letters: H query heads, G key/value heads of one core, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from nxd_cp.simulators.attention_block import DTYPES, KERNELS
from nxd_cp.simulators.nki_api import SimParams, load, parameters, record
from nxd_cp.simulators.nki_api.log import Log
from nxd_cp.simulators.timing import Estimate, constants_for, estimate

from .kernel_time import Busiest, Timed


def kernel_log(
    name: str,
    generation: str,
    *,
    q_len: int,
    k_len: int,
    mask: str = "full",
    num_heads: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 128,
    dtype: str = "bfloat16",
) -> Log:
    """The instruction log of "flash_fwd" or "flash_bwd" for one block on one core.

    Raises ValueError for another name, or a dtype other than bfloat16 and float32.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    q, k, row = _inputs(dtype, (1, num_heads, q_len, head_dim), (1, num_kv_heads, k_len, head_dim))
    package = load("nxd_cp.kernels", generation=generation)
    scale = head_dim**-0.5
    with parameters(SimParams(values=False)), record() as log:
        if name == "flash_fwd":
            package.flash_fwd.flash_fwd(q, k, k, mask, scale)
        else:
            package.flash_bwd.flash_bwd(q, q, k, k, row, row, mask, scale)
    return log


def _inputs(dtype: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.float32
    row = np.zeros((*q_shape[:3], 1), np.float32)
    return np.zeros(q_shape, kind), np.zeros(k_shape, kind), row


def time_kernel(name: str, generation: str, **shape: Any) -> Estimate:
    """Estimate of one block; keywords as in `kernel_log`."""
    return estimate(kernel_log(name, generation, **shape), generation)


@dataclass(frozen=True)
class _Numbers:
    """What is kept of an Estimate: bounds by resource, two times, shares at the DMA cap and of
    guesses.
    """

    bounds: dict[str, float]
    expected: float
    high: float
    dma_share: float
    guess_share: float


@lru_cache(maxsize=256)
def _numbers(
    name: str,
    generation: str,
    q_len: int,
    k_len: int,
    mask: str,
    num_heads: int,
    head_dim: int,
    dtype: str,
) -> _Numbers:
    times = time_kernel(
        name,
        generation,
        q_len=q_len,
        k_len=k_len,
        mask=mask,
        num_heads=num_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    moving = times.timeline.resource_busy.get("dma core rate", 0.0)
    return _Numbers(
        bounds=times.bounds,
        expected=times.expected_ns,
        high=times.pessimistic_ns,
        dma_share=moving / times.expected_ns,
        guess_share=times.guess_share,
    )


def timed_kernel(
    name: str,
    generation: str,
    *,
    heads_per_core: int,
    kv_heads_per_core: int,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    level: str = "expected",
    small: int = 1024,
    large: int = 3072,
) -> Timed | Busiest:
    """Extrapolated times of a kernel on one core; one group of heads is run, the rest multiplied.

    level: "low" gives bounds, "expected", or "high" gives pessimistic times. small and large: the
    lengths that are run. Raises ValueError when heads do not divide, or for an unknown name, dtype
    or level.
    """
    values = constants_for(generation).at(level)
    if kv_heads_per_core < 1 or heads_per_core % kv_heads_per_core:
        raise ValueError(
            f"heads: expected kv_heads_per_core to divide heads_per_core, "
            f"got {kv_heads_per_core} and {heads_per_core}"
        )
    heads = heads_per_core // kv_heads_per_core

    steady = _numbers(name, generation, large, large, "full", heads, head_dim, dtype)

    def timed(number: Callable[[_Numbers], float]) -> Timed:
        return Timed(
            lambda *block: number(_numbers(name, generation, *block, heads, head_dim, dtype)),
            fixed_ns=values.kernel_start + values.kernel_end,
            groups=kv_heads_per_core,
            small=small,
            large=large,
            dma_share=steady.dma_share,
            guess_share=steady.guess_share,
        )

    if level == "low":  # which resource is the busiest depends on the size
        return Busiest([timed(partial(_bound, resource=name)) for name in sorted(steady.bounds)])
    return timed(lambda found: found.expected if level == "expected" else found.high)


def _bound(numbers: _Numbers, resource: str) -> float:
    return numbers.bounds.get(resource, 0.0)
