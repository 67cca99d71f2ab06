"""The switch for expensive checks: `with nxd_cp.debug(): ...`.

Does: turn on checks that cost time, for the code inside the block, in this thread and in the
threads that `CPContext.local(n).run` starts. Does not: change any number that is right.
Inside the block
    a buffer that was sent is filled with NaN, so that a stale read shows;
    a buffer that is written while it is in flight raises RingError as its hop ends;
    a NaN in a rank's q, k or v raises on all ranks before anything is sent, and names the rank;
    a NaN in gradients on their way raises RingError where it arrives, and names sender and owner;
    sinks, and the q, k and v of `inference.decode`, raise on all ranks when they are not the same
    bit by bit on each;
    ranks that call from different places in the code raise: two layers of equal shape, swapped on
    one rank, look alike otherwise. Ranks that call from different lines on purpose raise as well.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

_NOT_CALLERS = ("<", str(Path(__file__).parent), str(Path(torch.__file__).parent))
_NUM_CALLERS = 6

_DEBUG: ContextVar[bool] = ContextVar("nxd_cp_debug", default=False)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Run the block with debug checks on (or off)."""
    if not isinstance(enabled, bool):
        raise ValueError(f"enabled: expected True or False, got {enabled!r}")
    token = _DEBUG.set(enabled)
    try:
        yield
    finally:
        _DEBUG.reset(token)


def debug_enabled() -> bool:
    """True inside a `debug()` block."""
    return _DEBUG.get()


def call_site() -> str:
    """Where the caller's code called: the line, and a few characters that differ with its callers.

    Frames of this package, of torch and of generated code are left out; paths too, which may differ
    between machines.
    """
    places: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(places) < _NUM_CALLERS:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_CALLERS) and "torchinductor" not in file:
            places.append(f"{Path(file).name[-40:]}:{frame.f_lineno}")
        frame = frame.f_back
    return f"{places[0] if places else '?'} (crc {zlib.crc32(' '.join(places).encode()):08x})"


def fingerprint(*tensors: Tensor | None) -> str:
    """In debug mode a few characters that differ where the numbers do, else nothing."""
    if not debug_enabled():
        return ""
    crc = 0
    for x in tensors:
        if x is not None:
            content = x.detach().contiguous().view(-1).view(torch.uint8)
            crc = zlib.crc32(bytes(content.tolist()), crc)
    return f"crc {crc:08x}"


def refuse_nan(**tensors: Tensor) -> None:
    """Raise ValueError for the first of these tensors that holds a NaN, saying where."""
    for name, x in tensors.items():
        found = x.isnan().nonzero()
        if len(found):
            raise ValueError(
                f"{name}: expected numbers, got {len(found)} NaN, the first at "
                f"{tuple(found[0].tolist())}; look at what computed it"
            )
