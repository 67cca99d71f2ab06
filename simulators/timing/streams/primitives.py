"""Single instructions and DMAs whose published times are the model's primitives.

Does: rebuild each microbenchmark as a short stream and read off what was measured. Does not: cover
rows that mix in something unknown (dynamic addresses of a whole kernel, framework launches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nxd_cp.simulators.nki_api.log import Log
from nxd_cp.simulators.timing.constants import constants_for
from nxd_cp.simulators.timing.program import Options, Program
from nxd_cp.simulators.timing.timeline import Timeline
from nxd_cp.simulators.timing.together import replay

from .builder import Stream


@dataclass(frozen=True)
class Primitive:
    """ns of what the row measures; bytes > 0 when the row is a rate; elements per instruction."""

    value_ns: float
    elements: int
    bytes: int = 0


def primitive(group: str, kernel: str, shape: str, metric: str) -> Primitive | None:
    """The model's time for a microbenchmark row, or None when it is not one of ours."""
    for (wanted, words), build in _ROWS.items():
        text = f"{kernel} | {shape} | {metric}"
        if group == wanted and all(word in text for word in words):
            return build()
    return None


def time(log: Log, generation: str) -> Timeline:
    """The timeline of a short stream, expected constants, program order."""
    values = constants_for(generation).at("expected")
    return replay(Program(log, generation, values, Options(order="program")))


def activation_ns(generation: str, elements: int, *, read: bool = False) -> float:
    """Duration of one exp of `elements` bf16 per partition, table loaded."""
    s = Stream()
    data, out = s.sbuf(128, elements), s.sbuf(128, elements)
    row = s.sbuf(128, 1, dtype="float32")
    for _ in range(2):
        s.scalar("exp", out, data, *([row] if read else []), read=read)
    line = time(s.log, generation)
    return line.end[1] - line.start[1]


def activation_chain_ns(generation: str) -> float:
    """Interval of a chain of dependent activations of one element."""
    s = Stream()
    tile = s.sbuf(128, 1, dtype="float32")
    for _ in range(10):
        s.scalar("exp", tile, tile)
    line = time(s.log, generation)
    return (line.start[9] - line.start[1]) / 8


def matmul_ns(generation: str, columns: int, dtype: str = "bfloat16") -> float:
    """Duration of one isolated matmul, from the first moving column to the result."""
    s = Stream()
    w, x = s.sbuf(128, 128, dtype=dtype), s.sbuf(128, columns, dtype=dtype)
    s.matmul(s.psum(128, columns), w, x)
    line = time(s.log, generation)
    return line.end[0] - line.start[0]


def matmul_interval_ns(generation: str, dtype: str = "bfloat16", count: int = 2000) -> float:
    """Interval of back-to-back matmuls of 512 columns, warm."""
    s = Stream()
    w, x = s.sbuf(128, 128, dtype=dtype), s.sbuf(128, 512, dtype=dtype)
    banks = [s.psum(128, 512) for _ in range(8)]
    for i in range(count):
        s.matmul(banks[i % 8], w, x, add=i >= 8)
    line = time(s.log, generation)
    return (line.start[-1] - line.start[count // 2]) / (count - 1 - count // 2)


def vector_ns(
    generation: str,
    opcode: str,
    elements: int,
    *,
    dtype: str = "float32",
    partitions: int = 128,
    sources: int = 1,
    dst: str | None = None,
    source: str = "sbuf",
) -> float:
    """Duration of one instruction on VectorE."""
    s = Stream()
    given = [
        s._tile(source if i == 0 else "sbuf", (partitions, elements), dtype) for i in range(sources)
    ]
    out = 1 if opcode == "tensor_reduce" else elements
    s.vector(opcode, s.sbuf(partitions, out, dtype=dst or dtype), *given)
    line = time(s.log, generation)
    return line.end[0] - line.start[0]


def stream_ns(
    generation: str,
    engine: str,
    opcode: str,
    elements: int,
    count: int,
    sources: int = 1,
    psum: bool = False,
    pointer: bool = False,
) -> float:
    """Time from the first start to the last free of `count` independent instructions.

    psum: the first source lies there. pointer: one more source is a scalar per partition.
    """
    s = Stream()
    for _ in range(count + 1):  # the first one loads the function table
        given = [s.sbuf(128, elements, dtype="float32") for _ in range(sources)]
        if psum:
            given[0] = s.psum(128, elements)
        if pointer:
            given.append(s.sbuf(128, 1, dtype="float32"))
        out = s.sbuf(128, elements, dtype="float32")
        if engine == "scalar":
            s.scalar(opcode, out, *given)
        else:
            s.vector(opcode, out, *given)
    line = time(s.log, generation)
    return line.free[-1] - line.start[1]


def dma_ns(generation: str, partitions: int, columns: int) -> float:
    """First to last byte of one DMA of [partitions, columns] bf16, contiguous in HBM."""
    s = Stream()
    s.load(s.hbm(partitions, columns))
    line = time(s.log, generation)
    begin, end = line.transfer[0]
    return end - begin


def dma_stream(
    generation: str, partitions: int, row_bytes: int, *, pieces: int = 1, count: int = 64
) -> tuple[float, int]:
    """(ns, bytes) of a stream of equal loads whose rows lie apart in HBM, without the ends.

    pieces: each row is read as so many separate pieces.
    """
    s = Stream()
    width = row_bytes // 2 // pieces
    wide = s.hbm(count * 128, pieces, 2 * width)
    for i in range(count):
        first = i * 128 + (i * partitions) % 128
        tile = s.sbuf(128, pieces, width)
        low = (i * partitions) % 128
        s.dma(tile[low : low + partitions], wide[first : first + partitions, :, :width])
    line = time(s.log, generation)
    middle = count // 2
    elapsed = line.transfer[count - 1][1] - line.transfer[middle][1]
    return elapsed, (count - 1 - middle) * partitions * row_bytes


def _rate(build: tuple[float, int]) -> Primitive:
    return Primitive(build[0], 4096, build[1])


_ROWS: dict[tuple[str, tuple[str, ...]], Callable[[], Primitive]] = {
    ("A6", ("DMA 32 KiB on one engine",)): lambda: Primitive(dma_ns("gen3", 4, 4096), 4096),
    ("A6", ("exp N=4096",)): lambda: Primitive(activation_ns("gen3", 4096), 4096),
    ("A6", ("table load",)): lambda: Primitive(constants_for("gen3").table_load.expected, 128),
    ("A6", ("DMA end",)): lambda: Primitive(constants_for("gen3").dma_done.expected, 128),
    ("A6", ("per engine",)): lambda: Primitive(dma_ns("gen3", 128, 128), 128),
    ("A6", ("first DMA byte",)): lambda: Primitive(
        constants_for("gen3").dma_software_start.expected, 128
    ),
    ("A6", ("exp N=128",)): lambda: Primitive(activation_ns("gen3", 128), 128),
    ("A7", ("ACTIVATE 1 element, duration",)): lambda: Primitive(activation_ns("gen2", 1), 1),
    ("A7", ("dependent chain",)): lambda: Primitive(activation_chain_ns("gen2"), 1),
    ("A7", ("moving 128",)): lambda: Primitive(matmul_ns("gen2", 128), 128),
    ("A7", ("N=8192, 128 partitions",)): lambda: Primitive(
        vector_ns("gen2", "tensor_tensor", 8192, sources=2), 8192
    ),
    ("A7", ("N=8192, 64 partitions",)): lambda: Primitive(
        vector_ns("gen2", "tensor_tensor", 8192, sources=2, partitions=64), 8192
    ),
    ("A7", ("DMA 32 KiB",)): lambda: Primitive(dma_ns("gen2", 4, 4096), 4096),
    ("A7", ("DMA 4 B",)): lambda: Primitive(dma_ns("gen2", 1, 2), 1),
    ("B0", ("activation_reduce",)): lambda: Primitive(
        activation_ns("gen3", 16384, read=True), 16384
    ),
    ("B0", ("tensor_reduce",)): lambda: Primitive(
        vector_ns("gen3", "tensor_reduce", 16384, dtype="bfloat16", dst="float32"), 16384
    ),
    ("B0", ("tensor_scalar quantise",)): lambda: Primitive(
        vector_ns("gen3", "tensor_scalar", 16384, dtype="float32", dst="float8_e4m3"), 16384
    ),
    ("K2", ("HBM->SBUF stream",)): lambda: _rate(dma_stream("gen2", 128, 8192)),
    ("K2", ("while DMA active",)): lambda: _rate(dma_stream("gen2", 128, 8192)),
    ("K2", ("fp8 x fp32",)): lambda: Primitive(
        vector_ns("gen2", "tensor_tensor", 4096, sources=2), 4096
    ),
    ("K2", ("four [32,8 KB]",)): lambda: _rate(dma_stream("gen2", 32, 8192)),
    ("K2", ("1 KB per partition",)): lambda: _rate(dma_stream("gen2", 128, 1024)),
    ("K2", ("[128,16,512 B]",)): lambda: _rate(dma_stream("gen2", 128, 8192, pieces=16)),
    ("K2", ("64 tensor_scalar",)): lambda: Primitive(
        stream_ns("gen2", "vector", "tensor_scalar", 64, 64, pointer=True), 64
    ),
    ("K2", ("one operand PSUM",)): lambda: Primitive(
        stream_ns("gen2", "vector", "tensor_tensor", 512, 8, sources=2, psum=True), 512
    ),
    ("K2", ("64 activations",)): lambda: Primitive(stream_ns("gen2", "scalar", "exp", 64, 64), 64),
    ("K2", ("chained matmuls",)): lambda: Primitive(matmul_interval_ns("gen2"), 512, 512),
}
