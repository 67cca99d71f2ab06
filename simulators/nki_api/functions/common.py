"""What the functions share: the result tile, and operands repeated to a shape.

Source: nki.language (parameters of each function); NKI release notes 0.4.0 (known issues).
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api.allocation import ndarray
from nxd_cp.simulators.nki_api.errors import broken, fail, unsupported
from nxd_cp.simulators.nki_api.memory import HBM
from nxd_cp.simulators.nki_api.rules import documented, inferred
from nxd_cp.simulators.nki_api.tensor import NkiTensor

TILE = documented(
    "language.tile",
    "nki.language (parameters of each function)",
    "operands are on-chip tiles (one of two may be a number) of one shape, up to free dims of "
    "size 1",
)
KNOWN_ISSUE = inferred(
    "language.known_issue",
    "NKI release notes 0.4.0 (known issues)",
    "operands of two-operand functions have one shape, power takes two tiles, and matmul an x that "
    "is transposed already",
)
NOT_ON_DEVICE = documented(
    "language.not_on_device",
    "NKI release notes 0.4.0 (known issues)",
    "fmod and mod exist in the vendor's simulator only; no compiler accepts them",
)


def check_tiles(name: str, *tiles: Any) -> None:
    """Every operand is an on-chip tile."""
    for tile in tiles:
        if type(tile) is not NkiTensor or tile.space == HBM:
            fail(TILE, f"nki.language.{name}", "an operand is no on-chip tile", operand=tile)


def result(name: str, shape: tuple[int, ...], dtype: Any, *tiles: Any) -> NkiTensor:
    """A new SBUF tile of `dtype`, or of the dtype that all operands have."""
    check_tiles(name, *tiles)
    if dtype is None and any(tile.dtype is not tiles[0].dtype for tile in tiles):
        both = " and ".join(tile.dtype for tile in tiles)
        unsupported(f"nki.language.{name} of {both}", "pass dtype=: no document gives a default")
    return ndarray(shape, dtype or tiles[0].dtype)


def widened(name: str, x: NkiTensor, shape: tuple[int, ...]) -> NkiTensor:
    """`x` with its free dims of size 1 repeated to `shape`, as a view."""
    pairs = list(zip(x.shape, shape, strict=False))
    legal = x.ndim == len(shape) and pairs[0][0] == pairs[0][1]
    if not legal or any(have not in (1, want) for have, want in pairs):
        fail(TILE, f"nki.language.{name}", f"shape {x.shape} against {shape}", operand=x)
    for dim, (have, want) in enumerate(pairs):
        if have != want:
            x = x.broadcast(dim, want)
    return x


def both_widened(name: str, x: NkiTensor, y: NkiTensor) -> tuple[NkiTensor, NkiTensor]:
    """Two tiles as views of one shape, with a warning where that repeats one."""
    if x.shape == y.shape:
        return x, y
    shape = tuple(max(sizes) for sizes in zip(x.shape, y.shape, strict=False))
    wide = widened(name, x, shape), widened(name, y, shape)
    broken(KNOWN_ISSUE, f"nki.language.{name}", "broadcasting", x=x, y=y)
    return wide
