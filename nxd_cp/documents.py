"""Packed documents: the ids that each rank's tokens carry, and what they spare.

Does: check `cu_seqlens` and turn it into document ids for every layout; leave out of a plan the
rectangles, and so the hops, in which no document meets itself; count what is left. Does not: mask
(`backends/`), or exchange ids (`ring.gather`).
All ranks know the ids of all ranks before keys move, so they leave out the same.

cu_seqlens: [documents + 1], integers, 0 first, never falling; document i holds the positions
cu_seqlens[i] to cu_seqlens[i + 1] - 1 of the whole sequence, in every row of the batch.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque

import torch
from torch import Tensor

from nxd_cp.backends.base import Documents
from nxd_cp.backends.intervals import as_band, visible_keys
from nxd_cp.schedule import Plan, Tile, spare, token_runs


def validate_values(cu_seqlens: Tensor | None, plan: Plan) -> None:
    """Raise ValueError unless the lengths begin at 0, never fall and end with the sequence."""
    if cu_seqlens is None:
        return
    values = cu_seqlens.cpu()
    if int(values[0]) != 0 or bool((values[1:] < values[:-1]).any()):
        raise ValueError(
            "cu_seqlens: expected 0 first and values that never fall, got "
            f"{_shortened(values.tolist())}"
        )
    if int(values[-1]) != plan.num_tokens:
        raise ValueError(
            f"cu_seqlens: expected {plan.num_tokens} last (the tokens of the whole sequence), got "
            f"{int(values[-1])}; give the same cu_seqlens to all ranks, and the length without "
            "padding as seq_len"
        )


def fingerprint(cu_seqlens: Tensor | None) -> str:
    """A few characters that differ where two ranks were given different lengths."""
    if cu_seqlens is None:
        return "None"
    values = cu_seqlens.detach().cpu().long().tolist()
    return f"{len(values) - 1} documents, crc {zlib.crc32(repr(values).encode()):08x}"


def ids_of_ranks(cu_seqlens: Tensor, plan: Plan, device: torch.device) -> list[Tensor]:
    """For each rank the document of each of its slots, int64 [1, S]; padding counts as the last."""
    ids = []
    for rank in range(plan.size):
        positions = slot_positions(plan.layout, plan.size, rank, plan.seq_len).to(device)
        ids.append(ids_of_positions(cu_seqlens.to(device), positions)[None])
    return ids


def ids_of_positions(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """The document, from 0 on, that holds each of these positions of the whole sequence."""
    return torch.searchsorted(
        cu_seqlens[1:].contiguous(), positions.to(cu_seqlens.dtype), right=True
    )


def slot_positions(layout: str, size: int, rank: int, seq_len: int) -> Tensor:
    """Positions of the slots that a rank holds, int64 [S], in local order."""
    runs = token_runs(layout, size, rank, seq_len)
    return torch.cat([torch.arange(run.start, run.stop, run.step) for run in runs])


def spared(plan: Plan, ids: list[Tensor]) -> Plan:
    """The plan without the rectangles in which no query sees a key of its own document.

    ids: [B or 1, S] of every rank. The plan itself where nothing can be left out. Remembered for
    the last few packings: layers of one step, and their backwards, ask for the same.
    """
    by_rank = torch.stack([one.cpu() for one in ids])
    found = _RECENT.find(plan, by_rank)
    return _RECENT.add(plan, by_rank, _spared(plan, by_rank)) if found is None else found


def _spared(plan: Plan, by_rank: Tensor) -> Plan:
    seeker = _Seeker(by_rank)
    tiles = [
        (rank, step.owner, tile)
        for rank, steps in enumerate(plan.steps)
        for step in steps
        for tile in step.tiles
    ]
    seen = [one for one in tiles if seeker.sees(*one)]
    return plan if len(seen) == len(tiles) else spare(plan, seen)


class _Recent:
    """The last few spared plans, by the plan they come from and the ids; thread-safe."""

    def __init__(self, num_kept: int) -> None:
        self._kept: deque[tuple[Plan, Tensor, Plan]] = deque(maxlen=num_kept)
        self._lock = threading.Lock()

    def find(self, plan: Plan, ids: Tensor) -> Plan | None:
        """The spared plan; None where it is not known."""
        with self._lock:
            kept = [*self._kept]
        for before, its, after in kept:
            if before == plan and torch.equal(its, ids):
                return after
        return None

    def add(self, plan: Plan, ids: Tensor, after: Plan) -> Plan:
        """Keep it, and return it."""
        with self._lock:
            self._kept.append((plan, ids, after))
        return after


_RECENT = _Recent(8)


def balance(plan: Plan, cu_seqlens: Tensor) -> tuple[float, ...]:
    """Per step that is left: the busiest rank's visible pairs over the mean; 1.0 is perfect."""
    ids = ids_of_ranks(cu_seqlens, plan, torch.device("cpu"))
    plan = spared(plan, ids)
    pairs = [
        [
            sum(_num_pairs(tile, ids[rank], ids[step.owner]) for tile in step.tiles)
            for rank, step in enumerate(steps)
        ]
        for steps in zip(*plan.steps, strict=True)
    ]
    return tuple(max(one) * plan.size / sum(one) if sum(one) else 1.0 for one in pairs)


def _num_pairs(tile: Tile, q_ids: Tensor, k_ids: Tensor) -> int:
    mask = Documents(tile.mask, q_ids[:, tile.q], k_ids[:, tile.k])
    first, stop = visible_keys(mask, tile.q_len, tile.k_len, q_ids.device)
    return int((stop - first).sum())


class _Seeker:
    """Finds out whether a rectangle shows anything, in time n log n and for ids in any order.

    Keys are sorted by (document, row); the first key of a query's document that is not before its
    band is then found by bisection, and it is seen if it is not behind the band.
    """

    def __init__(self, by_rank: Tensor) -> None:
        self._dense = by_rank.unique(return_inverse=True)[1]  # numbered from 0 on
        self._width = by_rank.shape[-1] + 1
        self._sorted = (self._dense * self._width + torch.arange(self._width - 1)).sort(-1)[0]

    def sees(self, rank: int, owner: int, tile: Tile) -> bool:
        """Whether some query of `rank` sees some key of `owner` in this rectangle."""
        band = as_band(tile.mask, tile.q_len, tile.k_len)
        row = torch.arange(tile.q_len)
        first = (row + band.low).clamp(min=0) + tile.k.start
        last = (row + band.high).clamp(max=tile.k_len - 1) + tile.k.start
        base = self._dense[rank][:, tile.q] * self._width
        keys = self._sorted[owner]
        place = torch.searchsorted(keys, base + first.clamp(max=self._width - 1))
        found = keys.gather(1, place.clamp(max=keys.shape[1] - 1))
        return bool(((place < keys.shape[1]) & (found <= base + last) & (last >= first)).any())


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"
