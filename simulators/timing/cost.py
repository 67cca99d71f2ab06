"""What one instruction costs: how long it holds its engine, and when its result is out.

Does: turn (opcode, engine, operands, flags) into a Cost of named parts; every part carries the name
of the constant that it rests on. Does not: know what else is running (machine.py), or DMA (dma.py).
An opcode without a rule raises ValueError with its name.

Letters: N elements per partition, K contraction rows, M stationary columns.
Source: the constants file of the generation; the rules are those of the cost notes named there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nxd_cp.simulators.nki_api import log as flags

from .access import Access
from .constants import Values

Parts = tuple[tuple[str, float], ...]  # (name of a constant, ns)

# ScalarE work that needs no function table and has the copy's shorter latency.
COPIES = frozenset(("copy", "identity", "cast", "tensor_copy", "tensor_scalar", "memset"))
# Functions that are in every table; the rest are grouped by what is computed together (a guess).
TABLE_OF = {
    "exp": 1,
    "square": 0,
    "relu": 0,
    "abs": 0,
    "sign": 0,
    "log": 2,
    "ln": 2,
    "sqrt": 3,
    "rsqrt": 3,
    "reciprocal": 4,
}
_ONE_PASS = frozenset(
    (
        "tensor_copy",
        "memset",
        "tensor_scalar",
        "tensor_reduce",
        "tensor_scalar_reduce",
        "tensor_scalar_cumulative",
        "select_reduce",
        "range_select",
        "bn_stats",
        "max8",
        "dropout",
        "nc_stream_shuffle",
        "nc_find_index8",
        "nc_match_replace8",
        "nc_transpose",
        "rng",
        "rand2",
        "quantize_mx",
        "iota",
        "affine_select",
        "set_rng_seed",
        "rand_set_state",
        "rand_get_state",
    )
)
_TWO_INPUTS = frozenset(("tensor_tensor", "scalar_tensor_tensor", "tensor_copy_predicated"))
# Passes of GpSimdE; only topk's is documented, the rest are one or two inputs.
_GPSIMD = {
    "tensor_tensor": 2.0,
    "tensor_partition_reduce": 2.0,
    "topk": 4.0,
    "local_gather": 1.0,
    "nc_n_gather": 1.0,
    "sequence_bounds": 1.0,
    "nonzero_with_count": 1.0,
    "sendrecv": 1.0,
}
_FAST_COPIES = frozenset(("tensor_copy", "tensor_scalar", "memset"))


@dataclass(frozen=True)
class Cost:
    """occupancy: the engine is held; latency: from start to the result, both from the start on.

    weights: exposed load of the stationary operand when TensorE does not run back to back.
    dma: what a collective takes of the core's DMA rate, ns.
    """

    occupancy: Parts
    latency: Parts
    weights: float = 0.0
    table: int | None = None
    dma: float = 0.0

    @cached_property
    def occupancy_ns(self) -> float:
        """Sum of the occupancy parts."""
        return sum(ns for _, ns in self.occupancy)

    @cached_property
    def latency_ns(self) -> float:
        """Sum of the latency parts."""
        return sum(ns for _, ns in self.latency)


def instruction_cost(
    generation: str,
    opcode: str,
    engine: str,
    detail: str,
    bits: int,
    elements: int,
    dst: Access | None,
    sources: tuple[Access, ...],
    c: Values,
) -> Cost:
    """The Cost of one instruction on a compute engine; ValueError for an opcode without a rule."""
    if opcode == "core_barrier":
        parts = (("core_barrier", c.core_barrier),)
        return Cost(parts, parts)
    if engine == "all":  # a register of the sequencer: the rank's number
        parts = (("semaphore", c.semaphore),)
        return Cost(parts, parts)
    if engine == "tensor":
        return _tensor(opcode, bits, elements, dst, sources, c)
    if engine == "scalar":
        return _scalar(generation, opcode, detail, bits, elements, dst, sources, c)
    if engine == "gpsimd":
        return _gpsimd(opcode, elements, c)
    if engine in ("vector", "sync"):
        return _vector(generation, opcode, bits, elements, dst, sources, c)
    raise ValueError(f"no cost rule for {opcode} on engine {engine!r}")


def _tensor(
    opcode: str,
    bits: int,
    elements: int,
    dst: Access | None,
    sources: tuple[Access, ...],
    c: Values,
) -> Cost:
    if opcode not in ("nc_matmul", "nc_transpose", "nc_matmul_mx"):
        raise ValueError(f"no cost rule for {opcode} on TensorE")
    transpose = opcode == "nc_transpose" or bool(bits & flags.TRANSPOSE)
    wide = opcode != "nc_matmul_mx" and sources[0].itemsize == 4
    passes = 1.0
    if wide:
        passes = c.transpose_fp32_passes if transpose else c.matmul_fp32_passes
        if bits & flags.ONEZERO:
            passes /= 2
    if transpose:
        passes *= c.transpose_background
    rows = (bits >> 8) & 0xFF or 128
    columns = (bits >> 16) & 0xFF or 128
    share = (rows / 128.0) * (columns / 128.0)  # tiles of the array run side by side
    clock = c.tensor_clock * c.tensor_sustained
    stream = passes * share * max(c.matmul_min_columns, float(elements)) / clock
    overhead = passes * share * c.matmul_overhead / clock
    stationary = sources[0].elements
    weights = passes * min(128, stationary) / c.weights_columns_per_cycle / c.tensor_clock
    held = (("tensor_clock", max(stream, weights)), ("matmul_overhead", overhead))
    return Cost(held, (*held, ("matmul_latency", c.matmul_latency)), weights=weights)


def _vector(
    generation: str,
    opcode: str,
    bits: int,
    elements: int,
    dst: Access | None,
    sources: tuple[Access, ...],
    c: Values,
) -> Cost:
    passes = _vector_passes(generation, opcode, dst, sources)
    cycles = passes * elements
    wide_stride = any(a.inner_stride_bytes > 16 and a.elements > 1 for a in (*sources, dst) if a)
    parts: list[tuple[str, float]] = [("vector_clock", cycles / c.vector_clock)]
    if wide_stride:
        parts.append(("stride_factor", (c.stride_factor - 1.0) * cycles / c.vector_clock))
    if _has_pointer(opcode, sources, bits):
        parts.append(("vector_pointer", c.vector_pointer))
    if bits & flags.READ_ACCUMULATOR:
        parts.append(("accumulator_read", c.accumulator_read / c.vector_clock))
    held = _at_least(
        (*parts, ("vector_issue", c.vector_issue)),
        ("vector_min_interval", c.vector_min_interval / c.vector_clock),
    )
    return Cost(held, (*parts, ("vector_latency", c.vector_latency)))


def _at_least(parts: Parts, floor: tuple[str, float]) -> Parts:
    """The parts, filled up to the shortest interval between instructions of the engine."""
    missing = floor[1] - sum(ns for _, ns in parts)
    return (*parts, (floor[0], missing)) if missing > 0 else parts


def _has_pointer(opcode: str, sources: tuple[Access, ...], bits: int) -> bool:
    operands = sources[:-1] if bits & flags.READ_ACCUMULATOR else sources
    return opcode in ("tensor_scalar", "scalar_tensor_tensor", "tensor_scalar_reduce") and any(
        a.elements == 1 for a in operands[1:]
    )


def _vector_passes(
    generation: str, opcode: str, dst: Access | None, sources: tuple[Access, ...]
) -> float:
    """Cycles per element of VectorE: one or two by inputs, fewer in 16-bit fast modes."""
    if opcode == "tensor_tensor_scan":
        return 2.0
    if opcode == "reciprocal":
        return 8.0
    if opcode == "bn_aggr":
        return 13.0 / 3.0
    tensors = [a for a in (dst, *sources) if a is not None and a.elements > 1]
    in_psum = [a.space == "psum" for a in tensors]
    small = all(a.itemsize <= 2 for a in tensors)
    if opcode == "exponential":
        return 0.25 if sources[0].itemsize <= 2 else 0.5
    if opcode in _TWO_INPUTS:
        operands = [a for a in sources if a.elements > 1]
        if len(operands) < 2:
            return 1.0
        if any(a.space == "psum" for a in operands):
            return 1.0
        if small and not any(in_psum):
            return 1.0 if generation == "gen2" else 0.5
        return 2.0
    if opcode == "tensor_reduce":
        return 0.5 if small and dst is not None and dst.itemsize <= 2 else 1.0
    if opcode not in _ONE_PASS:
        raise ValueError(f"no cost rule for {opcode} on VectorE")
    if generation != "gen2" and opcode in _FAST_COPIES:
        packed = all(a.inner_stride_bytes == a.itemsize for a in tensors)
        if small and not any(in_psum):
            return 0.25 if packed else 0.5
        if (small and packed) or not any(in_psum):
            return 0.5
    return 1.0


def _scalar(
    generation: str,
    opcode: str,
    detail: str,
    bits: int,
    elements: int,
    dst: Access | None,
    sources: tuple[Access, ...],
    c: Values,
) -> Cost:
    if opcode not in ("activation", "activation_reduce", "activate2", *COPIES):
        raise ValueError(f"no cost rule for {opcode} on ScalarE")
    copy = opcode in COPIES or detail in COPIES
    issue, latency = (
        ("scalar_copy_issue", "scalar_copy_latency") if copy else ("scalar_issue", "scalar_latency")
    )
    passes = 1.0
    tensors = [a for a in (dst, *sources) if a is not None and a.elements > 1]
    if generation == "gen4" and opcode in COPIES and all(a.itemsize <= 2 for a in tensors):
        passes = 0.5
    parts: list[tuple[str, float]] = [("scalar_clock", passes * elements / c.scalar_clock)]
    if bits & flags.READ_ACCUMULATOR:
        parts.append(("accumulator_read", c.accumulator_read / c.scalar_clock))
    held = _at_least(
        (*parts, (issue, getattr(c, issue))),
        ("scalar_min_interval", c.scalar_min_interval / c.scalar_clock),
    )
    return Cost(
        held,
        (*parts, (latency, getattr(c, latency))),
        table=None if copy else table_of(detail),
    )


def table_of(function: str) -> int:
    """The function table that an activation needs; 0 is in every table."""
    return TABLE_OF.get(function, 100 + sum(function.encode()))


def _gpsimd(opcode: str, elements: int, c: Values) -> Cost:
    passes = _GPSIMD.get(opcode, 1.0 if opcode in _ONE_PASS else 0.0)
    if not passes:
        raise ValueError(f"no cost rule for {opcode} on GpSimdE")
    parts = (
        (
            "gpsimd_cycles_per_element",
            passes * elements * c.gpsimd_cycles_per_element / c.gpsimd_clock,
        ),
        ("gpsimd_base", c.gpsimd_base / c.gpsimd_clock),
    )
    return Cost(parts, parts)
