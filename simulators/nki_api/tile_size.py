"""nl.tile_size: hardware tile sizes of the current generation.

Inside a kernel it reads the run's chip; outside, the environment's target.
Source: nki.language.tile_size.
"""

from __future__ import annotations

from . import chips
from .runtime import current_or_none


class _TileSize:
    """Hardware tile sizes of the current generation."""

    pmax = chips.NUM_PARTITIONS
    psum_fmax = psum_bank_fmax = chips.PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = chips.PSUM_BANK_BYTES
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_min_align = 4
    sbuf_min_align = 4
    psum_num_banks = chips.PSUM_BANKS

    @property
    def sbuf_size_bytes(self) -> int:
        """SBUF of a core in bytes, all partitions."""
        return _chip().sbuf_bytes * chips.NUM_PARTITIONS

    @property
    def sbuf_fmax_bytes(self) -> int:
        """Usable SBUF bytes per partition."""
        return _chip().sbuf_usable_bytes

    @property
    def sbuf_fmax(self) -> int:
        """Usable fp32 elements per partition."""
        return _chip().sbuf_usable_bytes // 4

    total_available_sbuf_size = sbuf_fmax_bytes


tile_size = _TileSize()


def _chip() -> chips.Chip:
    run = current_or_none()
    return run.chip if run is not None else chips.chip_for()
