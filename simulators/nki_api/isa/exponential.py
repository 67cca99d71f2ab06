"""VectorE's exponential (gen4): exp(src - max), with an optional running sum.

The sum is kept in the registers of accumulator.py. Tensor indirection is not implemented.

Source: nki.isa.exponential.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import per_partition
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current

from .accumulator import reduce_lanes
from .enums import reduce_cmd as commands
from .generation import need
from .issue import NkiInstruction, issue
from .stages import read, write

_TYPES = documented(
    "exponential.dtype",
    "nki.isa.exponential",
    "dst is of any type but uint32, src but tfloat32, neither float8_e4m3fn; at most 4 dims",
)
_COMMANDS = (commands.idle, commands.reset_reduce, commands.reduce, commands.load_reduce)


def exponential(
    dst: Any,
    src: Any,
    max_value: Any = 0.0,
    reduce_res: Any = None,
    reduce_cmd: Any = commands.idle,
    reduce_init: Any = 0.0,
    name: str | None = None,
) -> NkiInstruction:
    """dst = exp(src - max_value) on VectorE, with an optional running sum (gen4)."""
    instr = "nki.isa.exponential"
    run = current(instr)
    need(run, instr, 4)
    values = read(instr, run, "src", src)
    top = per_partition(instr, "max_value", max_value, src, float32_only=True)
    legal = dst.dtype is not dtypes.uint32 and src.dtype is not dtypes.tfloat32
    legal = legal and dtypes.float8_e4m3fn not in (dst.dtype, src.dtype)
    if not legal or max(dst.ndim, src.ndim) > 4:
        fail(_TYPES, instr, f"{src.dtype} to {dst.dtype}", dst=dst, src=src)
    result = np.exp(values - (np.float32(top) if type(top) is float else top))
    write(instr, run, dst, result, src=src)
    unset = type(reduce_init) in (int, float) and reduce_init == 0
    initial = None if unset and reduce_cmd is not commands.load_reduce else reduce_init
    reduce_lanes(
        instr, run, src, result, OPS["add"], ("add",), reduce_cmd, _COMMANDS, reduce_res, initial
    )
    flags = READ_ACCUMULATOR if reduce_res is not None else 0
    tiles = (src, max_value, reduce_res)
    return issue(run, "exponential", "vector", dst, tiles, src, flags, "exp", name)
