"""GpSimdE: sequence_bounds, where each element's segment begins and ends.

Source: nki.isa.sequence_bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import check_tile, destination, in_sbuf, source
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current

from .issue import NkiInstruction, issue

_OPERANDS = documented(
    "sequence_bounds.operands",
    "nki.isa.sequence_bounds",
    "segment_ids is [1, n] and dst [1, 2, n], both float32 or int32, ids are not negative",
)
_TYPES = (dtypes.float32, dtypes.int32)


def sequence_bounds(dst: Any, segment_ids: Any, name: str | None = None) -> NkiInstruction:
    """dst [1, 2, n] = first index and end of each element's segment; n and -1 for id 0."""
    instr = "nki.isa.sequence_bounds"
    run = current(instr)
    ids = source(instr, "segment_ids", segment_ids)
    check_tile(instr, "dst", dst)
    in_sbuf(instr, dst=dst, segment_ids=segment_ids)
    count = segment_ids.size
    legal = segment_ids.shape[0] == 1 and dst.shape == (1, 2, count)
    legal = legal and segment_ids.dtype in _TYPES and dst.dtype in _TYPES
    if run.values:
        legal = legal and ids.min() >= 0
    if not legal:
        fail(_OPERANDS, instr, f"{segment_ids.shape} into {dst.shape}", dst=dst, ids=segment_ids)
    out = destination(instr, "dst", dst)
    if run.values:
        flat = ids.reshape(-1)
        edges = np.flatnonzero(np.diff(flat)) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [count]])
        segment = np.searchsorted(starts, np.arange(count), side="right") - 1
        bounds = np.stack([starts[segment], ends[segment]])
        bounds[:, flat == 0] = [[count], [-1]]
        out[0] = bounds
    return issue(run, "sequence_bounds", "gpsimd", dst, (segment_ids,), count, name=name)
