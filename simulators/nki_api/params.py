"""How to simulate: SimParams, and the block in which they hold.

Source of NKI_PRECISE_FP: nki_simulator guide (Precise Floating-Point Mode).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .rules import RULES

PRECISE_VARIABLE = "NKI_PRECISE_FP"


@dataclass(frozen=True, kw_only=True)
class SimParams:
    """How to simulate.

    strict: rules of the inferred tier raise instead of warning.
    log: keep an instruction log even outside `record`, which is how to read one.
    values: False for shape-only mode: every check that needs no values, the whole log, and no
        arithmetic; outputs then have their shape and dtype, filled with the unwritten mark.
    adversarial: a seed for the worst legal order: who runs next is drawn, implicit rings go round
        in a drawn order per channel, and DMA writes to HBM that two cores share land as late as
        they may. A correct kernel gives the same results with every seed.
    stall_seconds: processor time without an instruction after which a kernel counts as endless and
        ends with an error that shows its line (sleeping: ten times as much); None never ends it.
    tolerate: ids of rules that warn where they would raise, for kernels that cannot be changed.
        Breaches after which nothing sensible can be computed raise all the same.
    precise_fp: False stores bfloat16 and 8-bit floats as float32, to tell a wrong algorithm from
        lost precision; outputs of these types are then float32. None: NKI_PRECISE_FP, or True.
    """

    strict: bool = False
    log: bool = False
    values: bool = True
    adversarial: int | None = None
    stall_seconds: float | None = 60.0
    tolerate: Collection[str] = ()
    precise_fp: bool | None = None

    def __post_init__(self) -> None:
        if self.stall_seconds is not None and not self.stall_seconds > 0:
            raise ValueError(
                f"expected stall_seconds above 0, or None for no limit, got {self.stall_seconds!r}"
            )

    def tolerated(self) -> frozenset[str]:
        """The ids in `tolerate`; ValueError for one that no rule has."""
        given = frozenset((self.tolerate,) if isinstance(self.tolerate, str) else self.tolerate)
        unknown = sorted(given - RULES.keys())
        if unknown:
            raise ValueError(
                f"expected ids of rules in SimParams(tolerate=), got {', '.join(unknown)}; a "
                "message names its rule"
            )
        return given

    def precise(self) -> bool:
        """Whether low-precision types are stored as what they are."""
        if self.precise_fp is not None:
            return self.precise_fp
        return os.environ.get(PRECISE_VARIABLE, "1") != "0"


_PARAMS: ContextVar[SimParams | None] = ContextVar("nki_simulator_params", default=None)


@contextmanager
def parameters(params: SimParams) -> Iterator[None]:
    """Use `params` for every kernel called in this block."""
    token = _PARAMS.set(params)
    try:
        yield
    finally:
        _PARAMS.reset(token)


def parameters_in_force() -> SimParams:
    """The parameters of the innermost `parameters` block, or the defaults."""
    return _PARAMS.get() or SimParams()
