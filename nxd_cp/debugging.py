"""The switch for expensive checks: `with nxd_cp.debug(): ...`.

Does: turn on checks that cost time, for the code inside the block, in this thread and in the
threads that `CPContext.local(n).run` starts. Does not: change any number that is right.
Inside the block, a buffer that was sent is filled with NaN, so that a stale read shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
