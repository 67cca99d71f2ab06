"""Checks shared by instructions, and the two ways to touch memory: `source` and `destination`.

`source` returns the NumPy view of an operand after checking place, partitions and that its bytes
were written. `destination` does the same for the output and records the write (so call it after
every `source`). A tensor object is checked once; later uses cost a few comparisons.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import dtypes
from .chips import NUM_PARTITIONS
from .errors import broken, fail
from .initmap import FRESH, OTHER
from .memory import HBM, PSUM, SBUF
from .ops import Op
from .rules import Rule, documented, inferred
from .runtime import current
from .tensor import NkiTensor

_TILE = documented(
    "operand.tile",
    "nki.isa (memory types of each instruction)",
    "an engine's operand is an on-chip NkiTensor in a memory the engine reaches",
)
_STATIC = documented(
    "operand.run_time_address",
    "nki.isa.dma_copy (Indirect addressing); NKI migration guide (tensor_copy)",
    "an address known at run time is for DMA, one for all partitions for tensor_copy too",
)
_START = documented(
    "operand.partition_start",
    "architecture guide, SBUF/PSUM access",
    "start partition: 0 for more than 64 partitions, 0 or 64 for 33 to 64, "
    "a multiple of 32 below; one partition after another",
)
_UNWRITTEN = documented(
    "memory.uninitialised",
    "nki.language guide, Creating Tensors",
    "memory is written before an engine reads it",
)
_OVERWRITTEN = inferred(
    "memory.overwritten",
    "nki.language.ndarray (address); our reading",
    "where placed tensors share bytes, a tensor is read before another one is written over it",
)
_SHAPES = documented(
    "operand.shapes",
    "nki.isa (tile size of each instruction)",
    "operands have equal partition counts and equal elements per partition",
)
_VECTOR = documented(
    "operand.per_partition",
    "nki.isa.tensor_scalar",
    "a broadcast operand is a number or a [partitions, 1] tile",
)
_OP = documented(
    "operand.op",
    "nki.api.shared, Supported Math Operators",
    "the operator is one that this field of the instruction takes",
)

_SINCE = documented(
    "operand.op_generation",
    "nki.language.abs_max, abs_min",
    "the operator exists on this NeuronCore generation: abs_max and abs_min from gen4",
)
_ONCE = inferred(
    "operand.repeated_output",
    "our reading of nki.language.NkiTensor.ap; which of the writes stays is written nowhere",
    "an output has every element once: no stride of 0, no steps shorter than what they step over",
)
_DIVIDE = inferred(
    "operand.divide",
    "NKI release notes 0.4.0 (known issues); nki.api.shared, Supported Math Operators",
    "no engine divides: multiply by the reciprocal",
)


def source(instr: str, role: str, tensor: Any) -> Any:
    """The NumPy view of an input operand in SBUF or PSUM, checked."""
    if not (type(tensor) is NkiTensor and tensor.checked):
        check_tile(instr, role, tensor)
    if tensor.storage.init.uniform <= 0:
        check_written(instr, role, tensor)
    return stand_in(tensor.shape, tensor.dtype) if tensor.storage.silent else tensor.array


@functools.lru_cache(maxsize=4096)
def stand_in(shape: tuple[int, ...], dtype: dtypes.DType) -> Any:
    """In shape-only mode, what operands of this shape are seen as: zeros that nobody may write."""
    return np.broadcast_to(np.zeros((), dtype.np_dtype), shape)


def copied(instr: str, role: str, tensor: Any, rule: Rule) -> tuple[Any, Any]:
    """`source` for a plain copy: (view, None), or (view, the elements that were ever written).

    Memory of which a part was written breaks `rule` only: tiles are copied with their padding.
    """
    if not (type(tensor) is NkiTensor and tensor.checked):
        check_tile(instr, role, tensor)
    init = tensor.storage.init
    if init.uniform < 0 and unwritten(tensor) and len(init.codes(tensor.region)) > 1:
        broken(rule, instr, f"{role} was written only in part", **{role: tensor})
        written = init.written(tensor.region)
        return tensor.array, written.all(axis=-1) if written.ndim > tensor.ndim else written
    return source(instr, role, tensor), None


def destination(instr: str, role: str, tensor: Any, code: int = OTHER) -> Any:
    """The NumPy view of an output operand, checked and marked as written by `code`."""
    if not (type(tensor) is NkiTensor and tensor.checked):
        check_tile(instr, role, tensor)
    init = tensor.storage.init
    if init.uniform != code:
        mark(tensor, code)
    if tensor.own_region.repeats:
        check_once(instr, role, tensor)
    return stand_in(tensor.shape, tensor.dtype) if tensor.storage.silent else tensor.array


def check_once(instr: str, role: str, tensor: NkiTensor) -> None:
    """Report an output whose view has the same bytes more than once."""
    if tensor.own_region.repeats:
        broken(_ONCE, instr, f"{role} has some elements several times", **{role: tensor})


def mark(tensor: NkiTensor, code: int) -> None:
    """Record that an instruction writes this view; fresh memory is filled first if needed."""
    storage, region = tensor.storage, tensor.own_region
    init, own = storage.init, storage.own
    if own is not None:
        new = own.uniform == FRESH or (region.dense and region.rect == own.whole)
        own.mark(region, code)
        init.mark_later(region, storage.map_origin, code)
        storage.group.owners.write(storage.number, region, new)
        return
    if init.uniform == FRESH and not (region.dense and region.rect == init.whole):
        storage.fill()
    init.mark(region, code)


def mark_moved(dst: NkiTensor, written: Any, code: int = OTHER) -> None:
    """Record that an engine moved memory here of which `written` (bool) was ever written."""
    mark(dst, FRESH)
    mark_where(dst, like(written, dst.shape), code)


def mark_where(tensor: NkiTensor, chosen: Any, code: int = OTHER) -> None:
    """Record that an engine writes the elements of this view that `chosen` (bool) selects."""
    storage = tensor.storage
    if storage.init.uniform == FRESH:
        storage.fill()
    if storage.init.fresh(tensor.region):
        storage.init.mark_where(tensor.region, chosen, code)
    else:
        mark(tensor, code)


def check_tile(instr: str, role: str, tensor: Any) -> None:
    """Place, partition count and start partition of an on-chip operand."""
    if not isinstance(tensor, NkiTensor):
        fail(_TILE, instr, f"{role} is not a tensor", **{role: tensor})
    if type(tensor) is not NkiTensor:
        fail(_STATIC, instr, f"{role} has a run-time address", **{role: tensor})
    if tensor.space == HBM:
        fail(_TILE, instr, f"{role} is in HBM; load it with nisa.dma_copy first", **{role: tensor})
    count, row = tensor.shape[0], tensor.row
    start = tensor.storage.first_partition + tensor.offset // row
    step = 128 if count > 64 else 64 if count > 32 else 32
    if count > NUM_PARTITIONS or start % step or (count > 1 and tensor.strides[0] != row):
        fail(_START, instr, f"{role} takes {count} partitions from {start}", **{role: tensor})
    tensor.checked = True


def unwritten(tensor: NkiTensor) -> bool:
    """Whether any byte of the view was never written, by any tensor placed there."""
    own = tensor.storage.own
    if own is not None and not own.fresh(tensor.own_region):
        return False
    return tensor.storage.init.fresh(tensor.region)


def check_written(instr: str, role: str, tensor: NkiTensor) -> None:
    """Raise if any byte of the view was never written."""
    storage, own = tensor.storage, tensor.storage.own
    if own is not None:  # placed
        ours = own.uniform > FRESH or not own.fresh(tensor.own_region)
        group = storage.group
        if (
            group.shared
            and not (ours and storage.number in group.clean)
            and not group.owners.holds(storage.number, tensor.own_region)
        ):
            broken(_OVERWRITTEN, instr, f"{role} holds what another tensor wrote", **{role: tensor})
        if ours:
            return
    if storage.init.fresh(tensor.region):
        where = ""
        if storage.site is not None:
            where = f", allocated at {storage.site[0]}:{storage.site[1]}"
        detail = f"{role} was never written (or only in part){where}"
        broken(_UNWRITTEN, instr, detail, **{role: tensor})
        if storage.init.uniform == FRESH:
            storage.fill()  # the rule is tolerated


def in_sbuf(instr: str, **operands: Any) -> None:
    """GpSimdE and TensorE inputs: no PSUM."""
    for role, tensor in operands.items():
        if type(tensor) is NkiTensor and tensor.space == SBUF:
            continue
        if isinstance(tensor, NkiTensor) and type(tensor) is not NkiTensor:
            check_tile(instr, role, tensor)
        if type(tensor) is not NkiTensor or tensor.space != SBUF:
            fail(_TILE, instr, f"{role} must be in SBUF", **{role: tensor})


def in_psum(tensor: Any) -> bool:
    """Whether an operand is a PSUM tile."""
    return type(tensor) is NkiTensor and tensor.space == PSUM


def same_tiles(instr: str, **operands: NkiTensor) -> None:
    """Equal partitions and elements per partition (ranks may differ)."""
    names = list(operands)
    first = operands[names[0]]
    for name in names[1:]:
        other = operands[name]
        if other.shape != first.shape and (
            other.shape[0] != first.shape[0] or other.size != first.size
        ):
            fail(
                _SHAPES,
                instr,
                f"{names[0]} has shape {first.shape}, {name} {other.shape}",
                **operands,
            )


def like(array: Any, shape: tuple[int, ...]) -> Any:
    """`array` in `shape` (same partitions and count), copying only if it must."""
    return array if array.shape == shape else array.reshape(shape)


def per_partition(
    instr: str, role: str, value: Any, data: NkiTensor, *, float32_only: bool = False
) -> Any:
    """A broadcast operand as a float, or as an fp32 array that broadcasts over `data`."""
    if type(value) is NkiTensor:
        array = source(instr, role, value)
        if value.shape[0] != data.shape[0] or value.size != data.shape[0]:
            fail(
                _VECTOR,
                instr,
                f"{role} has shape {value.shape}, data {data.shape}",
                **{role: value, "data": data},
            )
        if float32_only and value.dtype is not dtypes.float32:
            fail(_VECTOR, instr, f"{role} must be float32", **{role: value})
        wide = dtypes.to_f32(array, value.dtype)
        return wide if data.ndim == wide.ndim else wide.reshape((-1,) + (1,) * (data.ndim - 1))
    if isinstance(value, (int, float)) or hasattr(value, "__float__"):
        return float(value)
    fail(_VECTOR, instr, f"{role} is neither a number nor a tile", **{role: value})


def operator(instr: str, role: str, op: Any, kind: str) -> Op:
    """`op` as an Op that can play `kind` ("binary", "unary", "reduce", "activate")."""
    if type(op) is not Op or getattr(op, kind) is None:
        fail(_OP, instr, f"{role}={op!r} is no {kind} operator", **{role: op})
    if op.name == "divide":
        broken(_DIVIDE, instr, f"{role}={op!r}", **{role: op})
    if op.since > 2 and current(instr).chip.number < op.since:
        fail(_SINCE, instr, f"{role}={op!r} on {current(instr).chip.generation}", **{role: op})
    return op


def require(condition: bool, rule: Any, instr: str, detail: str, **operands: Any) -> None:
    """Break `rule` unless `condition`."""
    if not condition:
        broken(rule, instr, detail, **operands)
