"""NkiTensor.rearrange: split, reorder and merge dims by name, without a copy.

Source: nki.language.NkiTensor.rearrange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import fail
from .rules import documented

if TYPE_CHECKING:
    from .tensor import NkiTensor

_NAMES = documented(
    "view.rearrange",
    "nki.language.NkiTensor.rearrange",
    "both patterns use the same dim names, and the sizes fit",
)


def _groups(pattern: Any) -> list[tuple[str, ...]]:
    return [(g,) if isinstance(g, str) else tuple(g) for g in pattern]


def rearrange(tensor: Any, src: Any, dst: Any, fixed: dict[str, int]) -> NkiTensor:
    """See NkiTensor.rearrange; patterns are tuples of names or of tuples of names."""
    sources, targets = _groups(src), _groups(dst)
    names = [n for g in sources for n in g]
    if len(sources) != tensor.ndim or sorted(names) != sorted(n for g in targets for n in g):
        fail(_NAMES, "NkiTensor.rearrange", f"{src} -> {dst}", tensor=tensor)
    view = tensor
    for dim in reversed(range(len(sources))):
        group = sources[dim]
        if len(group) > 1:
            view = view.reshape_dim(dim, tuple(fixed.get(n, -1) for n in group))
        elif fixed.get(group[0], view.shape[dim]) != view.shape[dim]:
            fail(_NAMES, "NkiTensor.rearrange", f"{group[0]} is {view.shape[dim]}", tensor=tensor)
    view = view.permute(tuple(names.index(n) for g in targets for n in g))
    for dim, group in enumerate(targets):
        if len(group) > 1:
            view = view.flatten_dims(dim, dim + len(group) - 1)
    return view
