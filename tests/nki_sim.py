"""How the simulator's tests call kernels: plain functions over `nl` and `nisa`, no package."""

from __future__ import annotations

import numpy as np
import pytest

from nxd_cp.simulators.nki_api import Kernel, NkiValidationError
from nxd_cp.simulators.nki_api import isa as nisa
from nxd_cp.simulators.nki_api import language as nl

GENERATIONS = ("gen2", "gen3", "gen4")
FP32_ROUNDING = np.finfo(np.float32).eps


def run(kernel, *arrays, generation="gen3"):
    """Simulate one call."""
    return Kernel(kernel, generation)(*arrays)


def rejects(rule, kernel, *arrays, generation="gen3"):
    """The kernel must break `rule`, and the message must show the line marked `# bad`."""
    with pytest.raises(NkiValidationError) as caught:
        run(kernel, *arrays, generation=generation)
    text = str(caught.value)
    assert f"rule {rule} " in text, text
    assert "# bad" in text.splitlines()[-1], text
    return text


def sbuf(shape, dtype=None):
    """An SBUF tile."""
    return nl.ndarray(shape, dtype=dtype or nl.float32, buffer=nl.sbuf)


def psum(shape, dtype=None):
    """A PSUM tile."""
    return nl.ndarray(shape, dtype=dtype or nl.float32, buffer=nl.psum)


def load(array):
    """A whole HBM tensor in a fresh SBUF tile."""
    tile = sbuf(array.shape, array.dtype)
    nisa.dma_copy(dst=tile, src=array)
    return tile


def store(tile):
    """A fresh HBM output with the tile's values."""
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    if nl.is_psum(tile.buffer):
        copy = sbuf(tile.shape, tile.dtype)
        nisa.tensor_copy(dst=copy, src=tile)
        tile = copy
    nisa.dma_copy(dst=out, src=tile)
    return out


def normal(*shape, dtype=np.float32, seed=0):
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def own_rows(count):
    """This core's share of `count` rows."""
    share = count // nl.num_programs()
    return nl.ds(nl.program_id(0) * share, share)
