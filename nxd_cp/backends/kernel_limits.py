"""What the NKI kernels can take, and what one launch costs: SBUF bytes and instructions.

Does: refuse what no split can make fit; estimate a launch from above, so that `kernel_blocks.py`
can cut a rectangle until it fits. Does not: know tensors' contents, or run anything.

Letters: H query heads of one key/value head, S query rows, K keys, D head dim of q and k, E of v.
Sources: NKI API reference (nki.language.tile_size; nki.isa.range_select for the index range),
architecture guides (SBUF of trn1: 24 MiB, 192 KiB per partition).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask
from nxd_cp.validation import MAX_SCALE, MIN_SCALE, validate_tensors

ROWS = 128  # partitions: rows of a tile
WIDTH = 512  # keys of a wide tile
UNITS = 4  # row tiles of a forward block
MAX_HEAD_DIM = 256  # two contractions of 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MAX_SOFTCAP = 1e6
MAX_INDEX = 2**24  # interval bounds are compared in fp32
# So that a sum of exp over up to 2**24 keys lies in the documented range of log, 2**-64 to 2**64.
MAX_SCORE_BOUND = 27.0
SBUF_BYTES = 150 * 1024  # per partition, of the 176 KiB that trn1 leaves to kernels
# Kernels are unrolled, and the time to compile one grows with its length. No limit is documented;
# this one is ours.
MAX_INSTRUCTIONS = 40_000
LOOP_INSTRUCTIONS = 80  # around a device loop and in it: its ends, moving bounds, sums


@dataclass(frozen=True)
class Launch:
    """The shape of one launch, for one batch element and one key/value head.

    loops: whether the kernels that skip at run time run it; these hold and unroll one chunk of the
    side that passes by.
    """

    heads: int
    rows: int
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int
    mask: str = "full"
    softcap: bool = False
    loops: bool = False

    @property
    def units(self) -> int:
        """Row tiles of all heads."""
        return self.heads * ceil(self.rows / ROWS)

    @property
    def key_tiles(self) -> int:
        """Tiles of 128 keys."""
        return ceil(self.keys / ROWS)

    @property
    def contractions(self) -> tuple[int, int]:
        """Matmuls that one product over D and over E takes."""
        return ceil(self.head_dim / ROWS), ceil(self.value_dim / ROWS)

    def pairs(self, width: int) -> int:
        """Unit x key tile pairs that are computed, for key tiles of `width`."""
        if self.mask not in ("causal", "strict"):
            return self.units * ceil(self.keys / width)
        tiles = range(ceil(self.rows / ROWS))
        return self.heads * sum(ceil(min(self.keys, (t + 1) * ROWS) / width) for t in tiles)

    def forward_turn(self) -> Launch:
        """One turn of `loop_fwd`: the units of a block, a chunk of keys."""
        return replace(self, heads=1, rows=UNITS * ROWS, keys=WIDTH, loops=False)

    def backward_turn(self) -> Launch:
        """One turn of `loop_bwd`: a row tile of every head, a tile of keys."""
        return replace(self, rows=ROWS, keys=self.wide_keys, loops=False)

    @property
    def wide_keys(self) -> int:
        """Keys of a wide tile in the backward: dk and dv of it take a PSUM bank each."""
        return WIDTH if max(self.head_dim, self.value_dim) <= ROWS else WIDTH // 2


def forward_bytes(launch: Launch) -> int:
    """SBUF per partition that `flash_fwd` holds at once, an upper estimate."""
    if launch.loops:
        sums = UNITS * 4 * (launch.value_dim + 1) + 4 * 6 * launch.units
        return 2 * forward_bytes(launch.forward_turn()) + sums + 8 * 4 * WIDTH
    z, (d_parts, _) = launch.itemsize, launch.contractions
    rows_of_k = launch.key_tiles * launch.head_dim * z
    values = launch.key_tiles * (launch.value_dim + 1) * z
    keys = d_parts * launch.keys * z + max(rows_of_k, values)
    queries = UNITS * launch.head_dim * z + d_parts * WIDTH * z
    tiles = 6 * WIDTH * 4 + 3 * launch.value_dim * 4
    return keys + queries + tiles + 4 * (3 * launch.units + 4 * launch.key_tiles)


def backward_bytes(launch: Launch) -> int:
    """SBUF per partition that `flash_bwd` holds at once, an upper estimate."""
    if launch.loops:
        sums = launch.wide_keys // ROWS * 4 * (launch.head_dim + launch.value_dim)
        return backward_bytes(launch.backward_turn()) + sums + 8 * 4 * WIDTH
    z, (d_parts, e_parts) = launch.itemsize, launch.contractions
    keys = launch.keys * (d_parts + e_parts) * z
    keys += launch.key_tiles * (launch.head_dim + launch.value_dim) * z
    unit = (launch.head_dim + launch.value_dim + ROWS * (d_parts + e_parts)) * z
    unit += 4 * launch.head_dim + 16
    tiles = 6 * WIDTH * 4 + 2 * max(launch.head_dim, launch.value_dim) * 4
    return keys + launch.units * unit + tiles


def forward_instructions(launch: Launch) -> int:
    """Instructions of `flash_fwd` per key/value head, an upper estimate; a loop's count once."""
    if launch.loops:
        turn = forward_instructions(launch.forward_turn())
        return ceil(launch.units / UNITS) * (turn + LOOP_INSTRUCTIONS)
    d_parts, _ = launch.contractions
    interval = launch.mask == "interval"
    blocks = ceil(launch.units / UNITS)
    loads = launch.key_tiles * (2 + 2 * d_parts) + launch.units * (1 + 2 * d_parts)
    row_max = launch.pairs(WIDTH) * (d_parts + (6 if interval else 1)) + 5 * launch.units
    scores = ceil(launch.pairs(ROWS) / UNITS) + blocks + launch.key_tiles
    per_score = d_parts + 2 + (2 if interval else 0) + (2 if launch.softcap else 0)
    values = launch.pairs(ROWS) * (4 if interval else 1)
    finish = 10 * launch.units + 32 * blocks + 4 * (launch.key_tiles + launch.units)
    return loads + row_max + scores * per_score + values + finish + 16


def backward_instructions(launch: Launch) -> int:
    """Instructions of `flash_bwd` per key/value head, an upper estimate; a loop's count once."""
    wide = launch.wide_keys
    if launch.loops:
        turn = backward_instructions(launch.backward_turn()) + LOOP_INSTRUCTIONS
        return ceil(launch.keys / wide) * turn + launch.units + 16
    d_parts, e_parts = launch.contractions
    interval = launch.mask == "interval"
    loads = (launch.key_tiles + launch.units) * (2 + 2 * d_parts + 2 * e_parts)
    per_wide = d_parts + e_parts + 4 + (6 if interval else 0) + (4 if launch.softcap else 0)
    ends = 10 * launch.units + 6 * launch.key_tiles + 16
    return loads + launch.pairs(wide) * per_wide + launch.pairs(ROWS) * 5 + ends


def fits(launch: Launch) -> bool:
    """Whether both directions of a launch fit in SBUF and in the number of instructions."""
    return (
        max(forward_bytes(launch), backward_bytes(launch)) <= SBUF_BYTES
        and max(forward_instructions(launch), backward_instructions(launch)) <= MAX_INSTRUCTIONS
    )


def check_tensors(backend: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for dtypes and head dims that the kernels cannot take."""
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f'backend "{backend}": expected q, k and v all bfloat16, all float16 or all '
                f"float32, got {label} in {x.dtype}; cast it"
            )
    for label, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if dim > MAX_HEAD_DIM:
            raise ValueError(
                f'backend "{backend}": expected a head dim of at most {MAX_HEAD_DIM} (two '
                f'contractions of 128), got {dim} for {label}; use backend="torch"'
            )


def check_block(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    """Raise ValueError for a block whose shapes disagree, or that its mask does not fit."""
    check_tensors(backend, q, k, v)
    validate_tensors(q, k, v)
    num_rows, num_keys = q.shape[2], k.shape[2]
    if not isinstance(mask, str):
        check_lengths(backend, num_rows, num_keys)
    elif mask not in ("full", "causal", "strict"):
        raise ValueError(
            f'backend "{backend}": expected a mask "full", "causal" or "strict", got {mask!r}; '
            "others are a nxd_cp.schedule.Bounded, or Documents"
        )
    elif mask != "full" and num_rows != num_keys:
        raise ValueError(
            f'backend "{backend}": expected as many keys as rows under the mask "{mask}", got '
            f"{num_keys} and {num_rows}; say which with nxd_cp.schedule.Bounded"
        )


def check_rows(backend: str, q: Tensor, rows: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raise ValueError where a tensor beside q, by name, has not the shape that goes with it."""
    for name, (x, shape) in rows.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f'backend "{backend}": expected {name} of shape {shape} beside q of shape '
                f"{tuple(q.shape)}, got {tuple(x.shape)}; cut it as q"
            )


def check_numbers(backend: str, scale: float, softcap: float | None) -> None:
    """Raise ValueError for factors that would bring a score near the kernels' sentinels."""
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(
            f'backend "{backend}": expected a scale from {MIN_SCALE} to {MAX_SCALE}, got {scale}; '
            'move the factor into q, or use backend="torch"'
        )
    if softcap is not None and not MIN_SCALE <= softcap <= MAX_SOFTCAP:
        raise ValueError(
            f'backend "{backend}": expected a softcap from {MIN_SCALE} to {MAX_SOFTCAP}, got '
            f"{softcap}; a larger one changes nothing: pass None"
        )


def check_lengths(backend: str, num_rows: int, num_keys: int) -> None:
    """Raise ValueError where an index of an interval mask is no exact fp32."""
    if max(num_rows, num_keys) >= MAX_INDEX:
        raise ValueError(
            f'backend "{backend}": expected fewer than {MAX_INDEX} rows and keys per block (window '
            f"and document bounds are compared in fp32), got {num_rows} and {num_keys}; use more "
            "ranks"
        )


def check_cores(backend: str, generation: str | None, cores: int) -> None:
    """Raise ValueError for a number of cores per launch (LNC) that the chip does not have."""
    if cores not in (1, 2) or (cores == 2 and generation == "gen2"):
        raise ValueError(
            f'backend "{backend}": expected cores=1, or 2 from gen3 (trn2), got {cores}'
            f"{' on gen2' if generation == 'gen2' else ''}; pass cores=1"
        )


def shares(backend: str, cores: int, num_pairs: int, heads: int) -> int:
    """As how many each (batch, key/value head) pair must count, so that the cores share evenly.

    Two cores follow one control flow, each with half of the pairs. An odd number of pairs is made
    even by giving the query heads of each to two.
    """
    if num_pairs % cores == 0:
        return 1
    if heads % cores:
        raise ValueError(
            f'backend "{backend}": expected batch x key/value heads, or query heads per key/value '
            f"head, to be a multiple of the {cores} cores of a launch, got {num_pairs} and "
            f"{heads}; use cores=1"
        )
    return cores


def check_score_bound(backend: str, score_bound: float | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError where exp of a bounded score could leave its range."""
    if score_bound is None:
        return
    if not 0.0 < score_bound <= MAX_SCORE_BOUND:
        raise ValueError(
            f'backend "{backend}": expected a score_bound above 0 and at most {MAX_SCORE_BOUND}, '
            f"got {score_bound}; pass None, then every row finds its own maximum"
        )
    if dtype == torch.float16:
        raise ValueError(
            f'backend "{backend}": expected no score_bound with float16, whose range exp leaves, '
            f"got {score_bound}; pass None or use bfloat16"
        )
