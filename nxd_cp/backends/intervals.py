"""A mask as intervals: for each query the keys that it sees, for each key the queries that see it.

Does: turn any `BlockMask` into two integer tensors, for kernels that read bounds at run time and
need no new program for another packing. Does not: compute attention.
A band and documents that lie in one piece are intervals, and so is what both leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.schedule import Bounded, Mask

Bounds = tuple[Tensor, Tensor]


def visible_keys(mask: BlockMask, num_rows: int, num_keys: int, device: torch.device) -> Bounds:
    """(first, stop), int32 [B or 1, num_rows]: row i sees keys first[i] to stop[i] - 1.

    first = stop where a row sees nothing. Raises ValueError when a document's keys do not follow
    each other, as with ids that come back after another document.
    """
    row = torch.arange(num_rows, device=device)[None]
    band = as_band(mask.mask if isinstance(mask, Documents) else mask, num_rows, num_keys)
    first = (row + band.low).clamp(0, num_keys)
    stop = (row + band.high + 1).clamp(0, num_keys)
    if isinstance(mask, Documents):
        begin, end = _pieces(mask.k_ids, mask.q_ids)
        first, stop = torch.maximum(first, begin), torch.minimum(stop, end)
    return first.int(), torch.maximum(first, stop).int()


def visible_queries(mask: BlockMask, num_rows: int, num_keys: int, device: torch.device) -> Bounds:
    """(first, stop), int32 [B or 1, num_keys]: key j is seen by rows first[j] to stop[j] - 1."""
    inner = mask.mask if isinstance(mask, Documents) else mask
    band = as_band(inner, num_rows, num_keys)
    band = Bounded(-band.high, -band.low)
    turned = Documents(band, mask.k_ids, mask.q_ids) if isinstance(mask, Documents) else band
    return visible_keys(turned, num_keys, num_rows, device)


def as_band(mask: Mask, num_rows: int, num_keys: int) -> Bounded:
    """A named mask as the band that it is."""
    if isinstance(mask, Bounded):
        return mask
    return Bounded(-num_rows, {"full": num_keys, "causal": 0, "strict": -1}[mask])


def _pieces(ids: Tensor, wanted: Tensor) -> Bounds:
    """(begin, end) [B, rows]: where each wanted id lies among `ids` [B, keys]; empty where not."""
    place, order = ids.sort(dim=1, stable=True)
    begin = torch.searchsorted(place, wanted.contiguous())
    end = torch.searchsorted(place, wanted.contiguous(), right=True)
    last = ids.shape[1] - 1
    first_key = order.gather(1, begin.clamp(max=last))
    last_key = order.gather(1, (end - 1).clamp(min=0))
    found = end > begin
    if bool((found & (last_key - first_key != end - begin - 1)).any()):
        raise ValueError(
            "segment_ids: expected each document in one piece among the tokens of a rank, got one "
            'that comes back after another; use backend="torch"'
        )
    return first_key * found, (last_key + 1) * found
