"""nki.language's random numbers: random_seed, rand, dropout.

Equal seeds give equal numbers, as documented; the numbers differ from the device's (isa/random.py).

Source: nki.language.random_seed, rand, dropout.
"""

from __future__ import annotations

from typing import Any

from nxd_cp.simulators.nki_api import dtypes, isa
from nxd_cp.simulators.nki_api.allocation import ndarray, sbuf
from nxd_cp.simulators.nki_api.memory import HBM
from nxd_cp.simulators.nki_api.ops import OPS
from nxd_cp.simulators.nki_api.tensor import NkiTensor

from .common import result
from .movement import copy, store

_BITS = 24  # of a float32 mantissa


def random_seed(seed: Any) -> None:
    """Start the generator from a [1, 1] tile."""
    isa.set_rng_seed(seed)


def rand(shape: Any, dtype: Any, buffer: Any = sbuf, name: str = "") -> NkiTensor:
    """A tensor of uniform values in [0, 1)."""
    bits = ndarray(shape, dtypes.uint32)
    isa.rng(bits)
    isa.tensor_scalar(bits, bits, OPS["right_shift"], 32 - _BITS)
    tensor = ndarray(shape, dtype, buffer, name)
    values = tensor if tensor.space != HBM else ndarray(shape, dtype)
    isa.tensor_scalar(values, bits, OPS["multiply"], 2.0**-_BITS)
    if tensor.space == HBM:
        store(tensor, values)
    return tensor


def dropout(x: Any, rate: Any, dtype: Any = None) -> NkiTensor:
    """x with elements replaced by 0 with probability `rate`."""
    tile = result("dropout", getattr(x, "shape", ()), None, x)
    isa.dropout(tile, x, rate)
    return tile if dtype is None or dtypes.dtype_of(dtype) is tile.dtype else copy(tile, dtype)
