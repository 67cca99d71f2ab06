"""VectorE with a running value: tensor_scalar_cumulative, and exponential (gen4).

Both share the reduce registers of accumulator.py. Tensor indirection is not implemented.

Source: nki.isa.tensor_scalar_cumulative, nki.isa.exponential.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    destination,
    like,
    operator,
    per_partition,
    same_tiles,
    source,
)
from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.initmap import OTHER
from nxd_cp.simulators.nki_api.log import READ_ACCUMULATOR
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .accumulator import begin, reduce_lanes
from .enums import reduce_cmd as commands
from .generation import need
from .vector_engine import _present, _step

_CUMULATIVE = documented(
    "tensor_scalar_cumulative.operands",
    "nki.isa.tensor_scalar_cumulative",
    "op0 is arithmetic, op1 is add, subtract, multiply, max or min; no 32-bit integers; "
    "imm1 only with load_reduce; reduce_cmd is reset_reduce, reduce or load_reduce",
)
_EXPONENTIAL = documented(
    "exponential.dtype", "nki.isa.exponential", "dst is of any type but uint32, src but tfloat32"
)
_ORDERS = ("add", "subtract", "multiply", "max", "maximum", "min", "minimum")
_INT32 = (dtypes.int32, dtypes.uint32)


def tensor_scalar_cumulative(
    dst: Any,
    src: Any,
    op0: Any,
    op1: Any,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: Any = commands.reset_reduce,
    name: str | None = None,
) -> None:
    """r = (src[i] op0 imm0) op1 r; dst[i] = r, r kept in the reduce registers."""
    instr = "nki.isa.tensor_scalar_cumulative"
    run = current(instr)
    values = source(instr, "src", src)
    second = operator(instr, "op1", op1, "binary")
    legal = not getattr(op0, "bitvec", True) and second.name in _ORDERS
    legal = legal and reduce_cmd in (commands.reset_reduce, commands.reduce, commands.load_reduce)
    legal = legal and (imm1 is not None) is (reduce_cmd is commands.load_reduce)
    if not legal or src.dtype in _INT32 or dst.dtype in _INT32:
        fail(_CUMULATIVE, instr, f"{op0}, {op1}, {reduce_cmd}, imm1={imm1}", dst=dst, src=src)
    lanes = begin(instr, run, src, op1, reduce_cmd, imm1)[: src.shape[0], 0]
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, src=src)
    values = dtypes.to_f32(_present(run, values), src.dtype)
    inner = _step(instr, "0", values, op0, imm0, False, src)
    if run.values:
        steps = np.ascontiguousarray(inner.reshape(src.shape[0], -1).T)
        assert second.binary is not None, "operator() has checked the role"
        state = lanes.copy()
        for i in range(len(steps)):
            steps[i] = state = second.binary(steps[i], state)
        lanes[...] = state
        dtypes.store_f32(out, steps.T.reshape(out.shape), dst.dtype)
    if run.log is not None:
        tiles = tuple(t for t in (src, imm0, imm1) if type(t) is NkiTensor)
        elements = src.size // src.shape[0]
        run.log.add("tensor_scalar_cumulative", "vector", dst, tiles, elements, detail=op0.name)


def exponential(
    dst: Any,
    src: Any,
    max_value: Any = 0.0,
    reduce_res: Any = None,
    reduce_cmd: Any = commands.idle,
    reduce_init: Any = 0.0,
    name: str | None = None,
) -> None:
    """dst = exp(src - max_value) on VectorE, with an optional running sum (gen4)."""
    instr = "nki.isa.exponential"
    run = current(instr)
    need(run, instr, 4)
    values = source(instr, "src", src)
    top = per_partition(instr, "max_value", max_value, src, float32_only=True)
    if dst.dtype is dtypes.uint32 or src.dtype is dtypes.tfloat32:
        fail(_EXPONENTIAL, instr, f"{src.dtype} to {dst.dtype}", dst=dst, src=src)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, src=src)
    result = None
    if run.values:
        shift = np.float32(top) if type(top) is float else top
        result = np.exp(dtypes.to_f32(values, src.dtype) - shift)
        dtypes.store_f32(out, like(result, out.shape), dst.dtype)
    unset = type(reduce_init) in (int, float) and reduce_init == 0
    initial = None if unset and reduce_cmd is not commands.load_reduce else reduce_init
    reduce_lanes(instr, run, src, result, OPS["add"], ("add",), reduce_cmd, reduce_res, initial)
    if run.log is not None:
        tiles = tuple(t for t in (src, max_value, reduce_res) if type(t) is NkiTensor)
        flags = READ_ACCUMULATOR if reduce_res is not None else 0
        elements = src.size // src.shape[0]
        run.log.add("exponential", "vector", dst, tiles, elements, flags, detail="exp")
