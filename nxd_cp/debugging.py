"""The switch for expensive checks: `with nxd_cp.debug(): ...`.

Does: turn on checks that cost time, for the code inside the block, in this thread and in the
threads that `CPContext.local(n).run` starts. Does not: change any number that is right.
Inside the block
    a buffer that was sent is filled with NaN, so that a stale read shows;
    a buffer that is written while it is in flight raises RingError as its hop ends;
    a NaN in a rank's q, k or v raises on all ranks before anything is sent, and names the rank;
    a NaN in gradients on their way raises RingError where it arrives, and names sender and owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_DEBUG: ContextVar[bool] = ContextVar("nxd_cp_debug", default=False)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Run the block with debug checks on (or off)."""
    token = _DEBUG.set(enabled)
    try:
        yield
    finally:
        _DEBUG.reset(token)


def debug_enabled() -> bool:
    """True inside a `debug()` block."""
    return _DEBUG.get()


def refuse_nan(**tensors: Tensor) -> None:
    """Raise ValueError for the first of these tensors that holds a NaN, saying where."""
    for name, x in tensors.items():
        found = x.isnan().nonzero()
        if len(found):
            raise ValueError(
                f"{name}: expected numbers, got {len(found)} NaN, the first at "
                f"{tuple(found[0].tolist())}; look at what computed it"
            )
