"""Moving and filling on-chip memory: tensor_copy and memset.

A copy between equal dtypes moves bits, but for integers on ScalarE; any other goes through fp32.
tensor_copy also takes an address from a register or an index tile (`.ap(scalar_offset=...)`).
Tensor indirection is not implemented.

Source: nki.isa.tensor_copy, nki.isa.memset; NKI migration guide (tensor_copy_dynamic_src).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    copied,
    destination,
    in_psum,
    like,
    mark_moved,
    same_tiles,
)
from nxd_cp.simulators.nki_api.dynamic import resolved
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import OTHER, ZEROED
from nxd_cp.simulators.nki_api.log import DYNAMIC
from nxd_cp.simulators.nki_api.memory import PSUM
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run, current
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .enums import engine as engines
from .generation import absent
from .issue import NkiInstruction, issue

ENGINE = documented(
    "vector.engine",
    "nki.isa (engine parameter of each instruction)",
    "the engine named can run this instruction on this generation and memory",
)
_FILL = documented(
    "memset.value", "nki.isa.memset", "the value of an integer memset is one that dst can hold"
)
_KIND = documented(
    "memset.dtype",
    "NKI migration guide (nisa.memset, strict type matching)",
    "an integer tensor is filled with an integer: 2, not 2.0",
)
_GEN2 = inferred(
    "tensor_copy.run_time_address",
    "compiler errors NCC_IBIR829 and NCC_IBIR040, as reported by users of trn1",
    "on gen2 only a DMA takes an address known at run time",
)
_PADDING = inferred(
    "tensor_copy.uninitialised",
    "nki.language guide, Creating Tensors; nki-library@d2ad3a5 copies tiles with their padding",
    "a copy moves memory that was written; what was not stays unwritten where it arrives",
)
_ROUNDED = inferred(
    "tensor_copy.scalar_engine",
    "nki.isa.tensor_copy (bit-accurate copies are those of VectorE and GpSimdE)",
    "ScalarE copies through float32: 32-bit integers that it moves are ones that float32 holds",
)


def tensor_copy(
    dst: Any, src: Any, engine: Any = engines.unknown, name: str | None = None
) -> NkiInstruction:
    """dst = src within SBUF and PSUM; bit-exact for equal dtypes, else through fp32."""
    instr = "nki.isa.tensor_copy"
    run = current(instr)
    flags = 0
    if type(dst) is not NkiTensor or type(src) is not NkiTensor:
        if run.chip.number == 2:
            broken(_GEN2, instr, "an operand's address is known at run time", dst=dst, src=src)
        dst, src = resolved(instr, run, dst), resolved(instr, run, src)
        flags = DYNAMIC
    values, written = copied(instr, "src", src, _PADDING)
    if engine is not engines.unknown:
        _check_engine(instr, run, engine, dst, src)
    out = destination(instr, "dst", dst, OTHER)
    same_tiles(instr, dst=dst, src=src)
    if written is not None:
        mark_moved(dst, written)
    if not run.values:
        pass
    elif dst.dtype is src.dtype and (engine is not engines.scalar or dst.dtype.kind == "f"):
        out[...] = like(values, out.shape)
    else:
        dtypes.store_f32(out, like(dtypes.to_f32(values, src.dtype), out.shape), dst.dtype)
        if dst.dtype is src.dtype and not np.array_equal(out, like(values, out.shape)):
            broken(_ROUNDED, instr, "integers that float32 rounds", dst=dst, src=src)
    unit = "vector" if engine is engines.unknown else engine.name
    return issue(run, "tensor_copy", unit, dst, (src,), src, flags, name=name)


def _check_engine(instr: str, run: Run, engine: Any, dst: Any, src: Any) -> None:
    legal = engine in (engines.vector, engines.scalar, engines.gpsimd)
    if engine is engines.scalar and not run.chip.scalar_engine_copy:
        absent(run, instr, "on ScalarE needs gen3 (or nisa.activation with nl.copy)", src=src)
    if engine is engines.gpsimd and (in_psum(dst) or in_psum(src)):
        legal = False
    if not legal:
        fail(ENGINE, instr, f"{engine} cannot run it", dst=dst, src=src)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic))


def memset(
    dst: Any, value: Any, engine: Any = engines.unknown, name: str | None = None
) -> NkiInstruction:
    """Fill dst with a constant."""
    instr = "nki.isa.memset"
    run = current(instr)
    if engine not in (engines.unknown, engines.vector, engines.gpsimd) or (
        engine is engines.gpsimd and in_psum(dst)
    ):
        fail(ENGINE, instr, f"{engine} cannot run it", dst=dst)
    if not _is_number(value):
        raise TypeError(f"value is {value!r}, not a number")
    zeroed = value == 0 and type(dst) is NkiTensor and dst.space == PSUM
    out = destination(instr, "dst", dst, ZEROED if zeroed else OTHER)
    if dst.dtype.kind in "iu":
        info = np.iinfo(dst.dtype.np_dtype)
        if not math.isfinite(value) or value != int(value) or not info.min <= value <= info.max:
            fail(_FILL, instr, f"{value!r} is no {dst.dtype}", dst=dst)
        if not hasattr(value, "__index__"):
            broken(_KIND, instr, f"value={value!r} for {dst.dtype}", dst=dst)
        if run.values:
            out[...] = int(value)
    elif run.values:
        dtypes.store_f32(out, np.full((1,) * out.ndim, value, np.float32), dst.dtype)
    unit = "gpsimd" if engine is engines.gpsimd else "vector"
    return issue(run, "memset", unit, dst, (), dst, name=name)
