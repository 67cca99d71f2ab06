"""The position ids that a Hugging Face model makes its rotary embeddings from, checked.

Each rank's must be the global positions of its own tokens; local ones would be silently wrong.
Letters: L tokens of this rank.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from nxd_cp.context import CPContext
from nxd_cp.documents import slot_positions


class PositionCheck:
    """Compares the values once per forward of a model, for reading them waits for the device.

    Layers that get the tensor that was right, unchanged, do not read it again. The layer that read
    it does: its next call belongs to another forward.
    """

    def __init__(self, cp: CPContext | None) -> None:
        self._cp = None if cp is None or cp.size == 1 else cp
        self._right: weakref.ref[Tensor] | None = None
        self._seen: tuple[int, int, int] | None = None  # version, length, the layer that read

    def __call__(self, layer: nn.Module, position_ids: Tensor | None, length: int) -> None:
        """position_ids: [1 or B, L] integers. length: L.

        Raises ValueError unless they are the global positions of this rank's tokens.
        """
        if self._cp is not None:
            self._check(self._cp, layer, position_ids, length)

    @torch.compiler.disable  # values decide
    def _check(
        self, cp: CPContext, layer: nn.Module, position_ids: Tensor | None, length: int
    ) -> None:
        if position_ids is not None and self._is_known(layer, position_ids, length):
            return
        expected = slot_positions(cp.layout, cp.size, cp.rank, length * cp.size)
        if position_ids is None or not torch.equal(
            position_ids.cpu(), expected.expand(position_ids.shape)
        ):
            got = "none" if position_ids is None else f"{position_ids.flatten()[:3].tolist()}, ..."
            raise ValueError(
                f"position_ids: expected the global positions of this rank's tokens, "
                f"{expected[:3].tolist()}, ..., got {got}; make the batch with hf.shard_batch "
                "(positions are free with segment_ids)"
            )
        if not position_ids.is_inference():  # those have no version
            self._right = weakref.ref(position_ids)
            self._seen = position_ids._version, length, id(layer)

    def _is_known(self, layer: nn.Module, position_ids: Tensor, length: int) -> bool:
        if self._right is None or self._seen is None or self._right() is not position_ids:
            return False
        version, seen_length, reader = self._seen
        return (position_ids._version, length) == (version, seen_length) and id(layer) != reader
