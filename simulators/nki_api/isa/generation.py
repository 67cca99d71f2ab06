"""Which generation an instruction needs. Source: the nki.isa page of each instruction."""

from __future__ import annotations

from typing import Any, NoReturn

from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run

_GENERATION = documented(
    "instruction.generation",
    "nki.isa (availability note of each instruction)",
    "the instruction, or this form of it, exists on this NeuronCore generation",
)


def need(run: Run, instr: str, number: int) -> None:
    """Fail before NeuronCore-v`number`."""
    if run.chip.number < number:
        absent(run, instr, f"needs gen{number}")


def absent(run: Run, instr: str, detail: str, **operands: Any) -> NoReturn:
    """Fail for a form of an instruction that this generation does not have."""
    fail(_GENERATION, instr, f"{detail}, this is {run.chip.generation}", **operands)
