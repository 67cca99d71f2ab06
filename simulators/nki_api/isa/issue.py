"""The end of every instruction: count it, check its operands against each other, log it.

Returns the handle that the vendor's functions return, with depends_on. Does not order anything:
instructions run in program order here, which satisfies every dependency.

Source: nki.isa.NkiInstruction.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api.errors import broken, fail
from nxd_cp.simulators.nki_api.overlap import check_overlap
from nxd_cp.simulators.nki_api.ranks.flights import observe
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.runtime import Run
from nxd_cp.simulators.nki_api.tensor import NkiTensor

MAX_INSTRUCTIONS = 5_000_000

_OWNER = inferred(
    "tensor.run",
    "nki.jit; nki.language.ndarray (visible to one kernel instance); our reading",
    "a tensor is used in the call of the kernel that made it, on its own core",
)

_DEPENDENCY = documented(
    "instruction.depends_on",
    "nki.isa.NkiInstruction.depends_on",
    "producers are earlier instructions of this kernel, in the same device loop or an outer one",
)
_COUNT = inferred(
    "kernel.instructions",
    "compiler error NCC_EBVF030, as reported by users",
    "a kernel has at most 5,000,000 instructions after unrolling",
)


class NkiInstruction:
    """Handle of an instruction; `depends_on` states an order that already holds here."""

    __slots__ = ("loops", "name", "number", "opcode", "run")

    def __init__(self, run: Run, opcode: str, name: str | None) -> None:
        self.run = run
        self.number = run.issued
        self.loops = run.loops
        self.opcode = opcode
        self.name = name

    def __repr__(self) -> str:
        return f"<instruction {self.number} {self.opcode}>"

    def depends_on(self, *producers: NkiInstruction) -> NkiInstruction:
        """Run after every producer; returns self."""
        for producer in producers:
            legal = type(producer) is NkiInstruction and producer.run is self.run
            legal = legal and producer.number < self.number
            if not legal or self.loops[: len(producer.loops)] != producer.loops:
                fail(_DEPENDENCY, "depends_on", f"{self!r} after {producer!r}")
        return self


def _count(run: Run, opcode: str) -> None:
    """Warn once that no compiler takes so many; at twice as many, take the loop to be endless."""
    detail = f"instruction number {run.issued:,}"
    if run.issued == MAX_INSTRUCTIONS + 1:
        broken(_COUNT, f"nki.isa.{opcode}", detail)
    if run.issued > 2 * MAX_INSTRUCTIONS and not run.loops:
        fail(_COUNT, f"nki.isa.{opcode}", f"{detail}, outside device loops")


def issue(
    run: Run,
    opcode: str,
    engine: str,
    dst: Any,
    sources: tuple[Any, ...],
    sized: Any,
    flags: int = 0,
    detail: str = "",
    name: str | None = None,
) -> NkiInstruction:
    """Count and log an instruction.

    sources: operands that are read; those that are no tensors are left out of the log.
    sized: the tensor whose elements per partition are the instruction's size, or that number.
    """
    run.issued += 1
    tensors = [source for source in sources if isinstance(source, NkiTensor)]
    for tensor in tensors if dst is None else (dst, *tensors):
        owner = tensor.storage.owner
        if owner is not run and owner is not run.world:
            fail(_OWNER, f"nki.isa.{opcode}", "a tensor of another call", tensor=tensor)
    if name is not None:
        run.names.add(name)
    if run.issued > MAX_INSTRUCTIONS:
        _count(run, opcode)
    if run.core.lifetimes:
        for lifetimes in run.core.lifetimes.values():
            lifetimes.touch(run.issued, (dst, *tensors))
    if run.core.flights:
        observe(run.core.flights, f"nki.isa.{opcode}", dst, sources)
    if run.trace is not None:
        run.trace.add(opcode)
    if type(dst) is NkiTensor:
        for source in tensors:
            if source.space == dst.space and type(source) is NkiTensor:
                check_overlap(opcode, dst, source)
    if run.log is not None:
        elements = sized if type(sized) is int else sized.size // sized.shape[0]
        run.log.add(opcode, engine, dst, tensors, elements, flags, detail=detail)
    return NkiInstruction(run, opcode, name)
