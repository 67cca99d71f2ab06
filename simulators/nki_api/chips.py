"""What each NeuronCore generation has: one frozen row per generation, nothing computed.

gen2 is trn1 and inf2 (NeuronCore-v2), gen3 is trn2 (v3), gen4 is trn3 (v4). Sizes are per core.
Does not hold clocks or bandwidths: the cost model keeps its own table.

Sources: AWS Neuron SDK architecture guides (trainium_inferentia2, trainium2, trainium3) and the
nki.isa pages. `sbuf_usable_bytes` is what `nl.tile_size.sbuf_fmax_bytes` returns in nki 0.6.0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

NUM_PARTITIONS = 128
PSUM_BANK_BYTES = 2048
PSUM_BANKS = 8
PSUM_BYTES = PSUM_BANK_BYTES * PSUM_BANKS
DEFAULT_GENERATION = "gen4"  # the vendor's simulator also defaults to trn3
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


@dataclass(frozen=True)
class Chip:
    """One generation. Sizes in bytes per partition; `number` is nki.isa.nc_version's value."""

    generation: str
    number: int
    sbuf_bytes: int
    sbuf_usable_bytes: int
    matmul_moving_fp32: int  # largest moving free size for a float32 dst
    matmul_moving_bf16: int  # for a bfloat16 dst; 0 where such a dst does not exist
    matmul_dst_in_one_bank: bool
    matmul_on_foreign_psum: bool  # may a matmul accumulate onto memory another engine wrote
    exact_transpose: bool  # TensorE transposes bit by bit (NaN and Inf stay in their cell)
    hardware_dge: bool
    constant_bias: bool  # nki.isa.activation takes a compile-time bias
    scalar_engine_copy: bool  # tensor_copy and tensor_scalar run on ScalarE
    dma_priority: bool


CHIPS = {
    "gen2": Chip(
        "gen2", 2, 192 * 1024, 180_224, 512, 0, True, False, False, False, False, False, False
    ),
    "gen3": Chip(
        "gen3", 3, 224 * 1024, 212_984, 512, 0, True, False, True, True, True, True, False
    ),
    "gen4": Chip(
        "gen4", 4, 256 * 1024, 245_752, 4096, 8192, False, True, True, True, True, True, True
    ),
}
_ALIASES = {"trn1": "gen2", "inf2": "gen2", "trn2": "gen3", "trn3": "gen4"}


def generation_name(target: str | None = None) -> str:
    """`target` (or the environment's target, or gen4) as "gen2", "gen3" or "gen4".

    Raises ValueError for anything but trn1, inf2, trn2, trn3, gen2, gen3, gen4.
    """
    given = target or os.environ.get(TARGET_VARIABLE) or DEFAULT_GENERATION
    name = given.strip().lower()
    name = _ALIASES.get(name, name)
    if name not in CHIPS:
        known = ", ".join([*_ALIASES, *CHIPS])
        raise ValueError(
            f"expected a NeuronCore generation ({known}), got {given!r}; "
            f"pass generation= or set {TARGET_VARIABLE}"
        )
    return name


def chip_for(target: str | None = None) -> Chip:
    """The row of `target`, by the rules of `generation_name`."""
    return CHIPS[generation_name(target)]
