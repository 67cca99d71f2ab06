"""Enumerations of nki.isa, with the vendor's member names and values.

Source: nki.isa (engine, reduce_cmd, dge_mode, oob_mode, matmul_perf_mode, nc_version, dma_engine).
"""

from __future__ import annotations

from enum import Enum, IntEnum


class engine(Enum):
    """Engines of a NeuronCore."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0


class reduce_cmd(Enum):
    """What to do with an engine's reduce registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """Who generates DMA descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What an out-of-bounds dynamic address does."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    """TensorE performance modes."""

    none = "none"
    double_row = "double_row"


class nc_version(IntEnum):
    """NeuronCore generations; public kernels compare them (`>= nc_version.gen3`)."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    """Who moves data in sendrecv."""

    dma = 1
    gpsimd_dma = 2
