"""The kernels that skip at run time, called as those that do not: `loop_fwd` and `loop_bwd`.

Does: check that this NKI has device loops, and fill up rows and keys to whole chunks. Does not: cut
rectangles (`kernel_blocks.py`), or choose between the two kinds (`neuron.py`).

What is added at the end is seen by nobody: its bounds are empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nxd_cp.backends.kernel_limits import ROWS, WIDTH
from nxd_cp.backends.kernel_modules import kernel_module


class LoopKernels:
    """`forward` and `backward` take and return what `flash_fwd` and `flash_bwd` do, and all bounds.

    Arguments as of `KernelBackend`. Raises ValueError on a device whose NKI has no `fori_loop`.
    """

    def __init__(self, name: str, generation: str | None, cores: int) -> None:
        self.cores = cores
        self._fwd = kernel_module(name, generation, "loop_fwd")
        self._bwd = kernel_module(name, generation, "loop_bwd")
        if name != "simulate":
            check_language()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> Any:
        """o, lse and statistics of `flash_fwd(q, k, v, "interval", scale, ...)`."""
        named["bounds"] = _filled_bounds(named["bounds"], ROWS, WIDTH)
        # A row that sees nothing keeps the sum it carries, and o is divided by it.
        named["carry"] = tuple(_filled(x, ROWS, value=1.0) for x in named["carry"])
        inputs = _filled(q, ROWS), _filled(k, WIDTH), _filled(v, WIDTH)
        found = self._launch(self._fwd.loop_fwd)(*inputs, *options, **named)
        return tuple(x[:, :, : q.shape[2]] for x in found)

    def backward(self, *tensors_and_options: Any, **named: Any) -> Any:
        """dq, dk and dv of `flash_bwd(do, q, k, v, lse, delta, "interval", scale, ...)`."""
        tensors, options = tensors_and_options[:6], tensors_and_options[6:]
        sizes = ROWS, ROWS, WIDTH, WIDTH, ROWS, ROWS
        inputs = (_filled(x, size) for x, size in zip(tensors, sizes, strict=True))
        named["bounds"] = _filled_bounds(named["bounds"], ROWS, WIDTH)
        before = zip(named["carry"], (ROWS, WIDTH, WIDTH), strict=False)
        named["carry"] = tuple(_filled(x, size) for x, size in before)
        found = self._launch(self._bwd.loop_bwd)(*inputs, *options, **named)
        like = tensors[1:4]
        return tuple(x[:, :, : y.shape[2]] for x, y in zip(found, like, strict=True))

    def _launch(self, kernel: Any) -> Any:
        return kernel if self.cores == 1 else kernel[self.cores]


def check_language() -> None:
    """Raise ValueError where `nki.language` has no device loops of NKI 0.6."""
    import nki.language

    if not hasattr(nki.language, "fori_loop"):
        version = getattr(nki, "__version__", "an older one")
        raise ValueError(
            f"device_loops: expected NKI 0.6 or newer (nl.fori_loop), got {version}; use "
            'backend="nki" (device_loops=False), which computes all tiles of windows and documents'
        )


def _filled(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """[B, H, S, ...] with rows of `value` up to a multiple of `size`."""
    missing = -x.shape[2] % size
    if missing == 0:
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=value).contiguous()


def _filled_bounds(bounds: tuple[Tensor, ...], rows: int, keys: int) -> tuple[Tensor, ...]:
    """The bounds [B, S, 1] of queries (two) and keys (two), empty where rows were added."""
    sizes = rows, rows, keys, keys
    pairs = zip(bounds, sizes, strict=True)
    return tuple(_filled(x.unsqueeze(1), size).squeeze(1) for x, size in pairs)
