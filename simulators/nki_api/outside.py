"""A view that reaches outside its tensor and that no instruction uses.

Kernels make such a pattern for the tile after the last one and then skip that tile. Making it
warns, using it raises: whatever an instruction needs of its storage beyond its place is refused.

Source: NKI access patterns deep dive (.ap does not access memory).
"""

from __future__ import annotations

from typing import Any

from .errors import broken, fail, user_line
from .view_rules import BOUNDS, UNUSED

_PLACE = frozenset(("dtype", "first_partition", "name", "region", "row_bytes", "scale", "space"))


class Outside:
    """Stands in for the storage of such a view: has a place and a size, and no contents."""

    __slots__ = ("detail", "instr", "storage")

    def __init__(self, storage: Any, instr: str, detail: str) -> None:
        self.storage = storage
        self.instr = instr
        self.detail = detail

    def __getattr__(self, name: str) -> Any:
        if name in _PLACE:
            return getattr(self.storage, name)
        fail(BOUNDS, self.instr, self.detail)


def outside(view: Any, instr: str, detail: str) -> Any:
    """`view` (an NkiTensor) as one that may be made, and not used."""
    broken(UNUSED, instr, detail, tensor=view)
    view.storage = Outside(view.storage, instr, f"{detail}; made at {user_line()}")
    return view
