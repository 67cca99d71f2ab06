"""nki.isa: one function per instruction, one file per engine.

Every function has the vendor's name and arguments and the same four steps: check, compute in
fp32, round to dst, log. Names of the vendor's API that are not implemented raise when called.
"""

from __future__ import annotations

import inspect
from typing import Any

from nxd_cp.simulators.nki_api.arguments import guarded
from nxd_cp.simulators.nki_api.chips import chip_for
from nxd_cp.simulators.nki_api.errors import NkiValidationError, unsupported
from nxd_cp.simulators.nki_api.registers import Register as VirtualRegister
from nxd_cp.simulators.nki_api.registers import (
    register_alloc,
    register_load,
    register_move,
    register_store,
)
from nxd_cp.simulators.nki_api.runtime import current_or_none

from . import enums as constants
from .activate2 import activate2
from .copy import memset, tensor_copy
from .dma import dma_copy
from .dma_compute import dma_compute
from .dma_transpose import dma_transpose
from .elementwise import reciprocal, scalar_tensor_tensor, tensor_tensor
from .enums import (
    dge_mode,
    dma_engine,
    engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
)
from .exponential import exponential
from .gather import local_gather, nc_n_gather, nc_stream_shuffle, tensor_partition_reduce
from .gpsimd import affine_select, iota
from .issue import NkiInstruction
from .nc_transpose import nc_transpose
from .pair import core_barrier, sendrecv
from .random import dropout, rand2, rand_get_state, rand_set_state, rng, set_rng_seed
from .reduce import bn_aggr, bn_stats, tensor_reduce
from .scalar_engine import activation, activation_reduce
from .scan import tensor_scalar_cumulative, tensor_tensor_scan
from .search import max8, nc_find_index8, nc_match_replace8, nonzero_with_count
from .select import range_select, select_reduce, tensor_copy_predicated
from .sequence import sequence_bounds
from .tensor_engine import nc_matmul
from .tensor_scalar import tensor_scalar, tensor_scalar_reduce

tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown

MISSING = frozenset(["nc_matmul_mx", "quantize_mx", "topk"])


def get_nc_version() -> nc_version:
    """The generation of the run (outside a kernel: of the environment's target)."""
    run = current_or_none()
    return nc_version[(run.chip if run is not None else chip_for()).generation]


def get_nc_sub_version() -> int:
    """Silicon revision; the simulator models the first."""
    return 0


def __getattr__(name: str) -> Any:
    if name in MISSING:

        def missing(*args: Any, **kwargs: Any) -> None:
            unsupported(f"nki.isa.{name}")

        return missing
    raise AttributeError(f"module 'nki.isa' has no attribute {name!r}")


__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "constants",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "rng",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
]

for _name in __all__:
    if inspect.isfunction(globals()[_name]):
        globals()[_name] = guarded("nki.isa", globals()[_name])
