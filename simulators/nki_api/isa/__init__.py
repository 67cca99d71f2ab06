"""nki.isa: one function per instruction, one file per engine.

Every function has the vendor's name and arguments and the same four steps: check, compute in
fp32, round to dst, log. Names of the vendor's API that are not implemented raise when called.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api.chips import chip_for
from nxd_cp.simulators.nki_api.errors import NkiValidationError, unsupported
from nxd_cp.simulators.nki_api.runtime import current_or_none

from .dma import dma_copy
from .enums import (
    dge_mode,
    dma_engine,
    engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
)
from .gpsimd import affine_select, iota
from .scalar_engine import activation, activation_reduce
from .tensor_engine import nc_matmul, nc_transpose
from .vector_engine import (
    memset,
    reciprocal,
    scalar_tensor_tensor,
    tensor_copy,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
)

tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown

_NOT_YET = frozenset(
    [
        "activate2",
        "bn_aggr",
        "bn_stats",
        "core_barrier",
        "dma_compute",
        "dma_transpose",
        "dropout",
        "exponential",
        "local_gather",
        "max8",
        "nc_find_index8",
        "nc_match_replace8",
        "nc_matmul_mx",
        "nc_n_gather",
        "nc_stream_shuffle",
        "nonzero_with_count",
        "quantize_mx",
        "rand2",
        "rand_get_state",
        "rand_set_state",
        "range_select",
        "register_alloc",
        "register_load",
        "register_move",
        "register_store",
        "rng",
        "select_reduce",
        "sendrecv",
        "sequence_bounds",
        "set_rng_seed",
        "tensor_copy_predicated",
        "tensor_partition_reduce",
        "tensor_scalar_cumulative",
        "tensor_scalar_reduce",
        "tensor_tensor_scan",
        "topk",
    ]
)


def get_nc_version() -> nc_version:
    """The generation of the run (outside a kernel: of the environment's target)."""
    run = current_or_none()
    return nc_version[(run.chip if run is not None else chip_for()).generation]


def get_nc_sub_version() -> int:
    """Silicon revision; the simulator models the first."""
    return 0


def __getattr__(name: str) -> Any:
    if name in _NOT_YET:

        def missing(*args: Any, **kwargs: Any) -> None:
            unsupported(f"nki.isa.{name}")

        return missing
    raise AttributeError(f"module 'nki.isa' has no attribute {name!r}")


__all__ = [
    "NkiValidationError",
    "activation",
    "activation_reduce",
    "affine_select",
    "dge_mode",
    "dma_copy",
    "dma_engine",
    "engine",
    "get_nc_sub_version",
    "get_nc_version",
    "iota",
    "matmul_perf_mode",
    "memset",
    "nc_matmul",
    "nc_transpose",
    "nc_version",
    "oob_mode",
    "reciprocal",
    "reduce_cmd",
    "scalar_tensor_tensor",
    "tensor_copy",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_tensor",
]
