"""Which generation an instruction needs. Source: the nki.isa page of each instruction."""

from __future__ import annotations

from nxd_cp.simulators.nki_api.errors import fail
from nxd_cp.simulators.nki_api.rules import documented
from nxd_cp.simulators.nki_api.runtime import Run

_GENERATION = documented(
    "instruction.generation",
    "nki.isa (availability note of each instruction)",
    "the instruction exists on this NeuronCore generation",
)


def need(run: Run, instr: str, number: int) -> None:
    """Fail before NeuronCore-v`number`."""
    if run.chip.number < number:
        fail(_GENERATION, instr, f"needs gen{number}, this is {run.chip.generation}")
