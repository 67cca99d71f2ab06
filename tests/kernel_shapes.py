"""What launches of the kernels cost, counted in shape-only runs: instructions, SBUF, PSUM.

Does: run one launch without arithmetic and read its log; add up all launches of a rectangle, each
different shape run once. Does not: say how long anything takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.kernel_blocks import split
from nxd_cp.backends.kernel_limits import MAX_INSTRUCTIONS, Launch
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.schedule import Bounded
from nxd_cp.simulators.nki_api import Log, SimParams, parameters, record
from nxd_cp.simulators.nki_api.chips import PSUM_BYTES


@dataclass(frozen=True)
class Cost:
    """Instructions, and the largest use of SBUF and PSUM in bytes per partition."""

    instructions: int
    sbuf: int
    psum: int


def run_shapes(launch: Launch, generation: str, *, carry: bool = False) -> tuple[Cost, Cost]:
    """Forward and backward of one launch that fits; carry: with what earlier ones left."""
    dtype = torch.bfloat16 if launch.itemsize == 2 else torch.float32
    mask = Bounded(-launch.rows, 0) if launch.mask == "interval" else launch.mask
    q = torch.zeros(1, launch.heads, launch.rows, launch.head_dim, dtype=dtype)
    k = torch.zeros(1, 1, launch.keys, launch.head_dim, dtype=dtype)
    v = torch.zeros(1, 1, launch.keys, launch.value_dim, dtype=dtype)
    do = torch.zeros(1, launch.heads, launch.rows, launch.value_dim, dtype=dtype)
    row = torch.zeros(1, launch.heads, launch.rows)
    before = (do.float(), row) if carry else None
    grads = (q.float(), k.float(), v.float()) if carry else None
    backend = KernelBackend("simulate", generation)
    scores = Scores(mask, 1.0, 10.0 if launch.softcap else None)
    with parameters(SimParams(values=False)):
        with record() as forward:
            backend.forward(q, k, v, scores, before)
        with record() as backward:
            backend.backward(QueryRows(do, q, do, row, row), k, v, scores, grads)
    return cost(forward), cost(backward)


def cost(log: Log) -> Cost:
    """Of one launch: the bytes between the lowest and the highest that were ever in use."""
    used = {}
    for space in ("sbuf", "psum"):
        tiles = [b for b in log.buffers if b.space == space]
        used[space] = max(b.address + b.row_bytes for b in tiles) - min(b.address for b in tiles)
    return Cost(len(log), used["sbuf"], used["psum"])


@dataclass(frozen=True)
class Total:
    """All launches of a rectangle in one direction; sbuf, psum, longest: of the worst launch."""

    launches: int
    instructions: int
    longest: int
    sbuf: int
    psum: int


def whole_rectangle(launch: Launch, generation: str) -> tuple[Total, Total]:
    """Forward and backward of a rectangle of any size, cut as the host cuts it.

    Interval masks count every launch, as if something were visible in each.
    """
    shapes = Counter(
        replace(
            launch,
            heads=block.heads.stop - block.heads.start,
            rows=block.rows.stop - block.rows.start,
            keys=block.keys.stop - block.keys.start,
            mask=block.mask,
        )
        for block in split(launch, 1)
    )
    costs = [(run_shapes(shape, generation, carry=True), n) for shape, n in shapes.items()]
    found = []
    for direction in (0, 1):
        one_each = [(both[direction], n) for both, n in costs]
        found.append(
            Total(
                launches=sum(n for _, n in one_each),
                instructions=sum(c.instructions * n for c, n in one_each),
                longest=max(c.instructions for c, _ in one_each),
                sbuf=max(c.sbuf for c, _ in one_each),
                psum=max(c.psum for c, _ in one_each),
            )
        )
    return found[0], found[1]


def exceeded(total: Total, sbuf_bytes: int) -> str:
    """What exceeds a chip's SBUF, PSUM or the host's limit on instructions, or nothing."""
    if total.sbuf > sbuf_bytes:
        return f"SBUF: {total.sbuf} of {sbuf_bytes} bytes per partition"
    if total.psum > PSUM_BYTES:
        return f"PSUM: {total.psum} of {PSUM_BYTES} bytes per partition"
    if total.longest > MAX_INSTRUCTIONS:
        return f"instructions: {total.longest} of {MAX_INSTRUCTIONS}"
    return ""
