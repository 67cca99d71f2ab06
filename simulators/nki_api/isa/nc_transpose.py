"""nc_transpose: on TensorE (SBUF to PSUM), or on VectorE in blocks of up to 32 x 32.

Bit-exact, but for TensorE on gen2, which multiplies: there NaN and infinity spread, and dst may be
float32 as that of any product.

Source: nki.isa.nc_transpose; Trainium2 architecture guide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nxd_cp.simulators.nki_api import dtypes
from nxd_cp.simulators.nki_api.checks import (
    copied,
    destination,
    in_psum,
    like,
    mark_moved,
    source,
)
from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.initmap import MATMUL, OTHER
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import current

from .enums import engine as engines
from .issue import NkiInstruction, issue
from .matmul_checks import TENSOR_TYPES

_TRANSPOSE = documented(
    "nc_transpose.operands",
    "nki.isa.nc_transpose",
    "dst has data's dtype and the transposed shape; TensorE reads SBUF "
    "[<=128, <=128] and writes PSUM, VectorE takes [<=32, <=32]",
)
_PRODUCT = inferred(
    "nc_transpose.product",
    "nki.isa.nc_matmul (float32 dst on gen2); nki-library@d2ad3a5 (qkv_cte_utils.py, gen2)",
    "dst has data's dtype also on gen2, where TensorE transposes by a product with a float32 dst",
)
PADDING = inferred(
    "transpose.uninitialised",
    "nki.language guide, Creating Tensors; nki-library@d2ad3a5 (find_nonzero_indices.py)",
    "a transpose moves memory that was written; what was not stays unwritten where it arrives",
)


def nc_transpose(
    dst: Any, data: Any, engine: Any = engines.unknown, name: str | None = None
) -> NkiInstruction:
    """dst[F, P] = data[P, F].T on TensorE (SBUF to PSUM) or VectorE (up to 32 x 32)."""
    instr = "nki.isa.nc_transpose"
    run = current(instr)
    values, written = copied(instr, "data", data, PADDING)
    flat = values if values.ndim == 2 else values.reshape(values.shape[0], -1)
    rows, columns = flat.shape
    small = rows <= 32 and columns <= 32
    on_tensor = engine is engines.tensor or (
        engine is engines.unknown and (not small or (in_psum(dst) and not in_psum(data)))
    )
    product = on_tensor and not run.chip.exact_transpose
    wide = product and dst.dtype is dtypes.float32 and data.dtype in TENSOR_TYPES
    legal = (dst.shape[0], dst.size // dst.shape[0]) == (columns, rows)
    legal = legal and (dst.dtype is data.dtype or wide)
    if on_tensor:
        legal = legal and in_psum(dst) and not in_psum(data) and columns <= 128
    else:
        legal = legal and small and engine in (engines.vector, engines.unknown)
    if not legal:
        fail(
            _TRANSPOSE,
            instr,
            f"{data.shape} -> {dst.shape} on {'tensor' if on_tensor else 'vector'} engine",
            dst=dst,
            data=data,
        )
    if dst.dtype is not data.dtype:
        broken(_PRODUCT, instr, f"{data.dtype} into {dst.dtype}", dst=dst, data=data)
    if product:
        source(instr, "data", data)  # a product mixes what was written with what was not
    code = MATMUL if on_tensor else OTHER
    out = destination(instr, "dst", dst, code)
    if written is not None:
        mark_moved(dst, written.reshape(flat.shape).T, code)
    if not run.values:
        pass
    elif product and not _finite(flat, data.dtype):
        result = np.matmul(dtypes.to_f32(flat, data.dtype).T, np.eye(rows, dtype=np.float32))
        dtypes.store_f32(out, like(result, out.shape), dst.dtype)
    elif dst.dtype is not data.dtype:
        out[...] = like(dtypes.to_f32(flat, data.dtype).T, out.shape)
    else:
        out[...] = like(flat.T, out.shape)
    unit, elements = ("tensor", rows) if on_tensor else ("vector", columns)
    return issue(run, "nc_transpose", unit, dst, (data,), int(elements), name=name)


def _finite(array: Any, dtype: dtypes.DType) -> bool:
    if dtype.kind != "f":
        return True
    return bool(np.isfinite(dtypes.to_f32(array, dtype)).all())
