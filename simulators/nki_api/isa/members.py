"""Enum arguments: members, or with a warning their values, which public kernels still give.

Source: NKI migration guide (Integer enum constants no longer supported).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from nxd_cp.simulators.nki_api.errors import broken
from nxd_cp.simulators.nki_api.rules import inferred

_INTEGER = inferred(
    "instruction.integer_enum",
    "NKI migration guide; nki-library@d2ad3a5 gives integers (norm_tkg_utils.py) and text all the "
    "same",
    "an enum argument is a member, not its value",
)


def member(instr: str, enum: type[Enum], value: Any) -> Any:
    """`value`, or the member with that value, with a warning; TypeError for anything else."""
    if isinstance(value, enum):
        return value
    found = next((m for m in enum if type(value) in (int, str) and m.value == value), None)
    if found is None:
        raise TypeError(f"expected a member of nki.isa.{enum.__name__}, got {value!r}")
    broken(_INTEGER, instr, f"{enum.__name__}={value!r}; write nki.isa.{found}")
    return found
