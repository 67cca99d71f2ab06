"""SimParams(values=False): no arithmetic, the same checks, the same log."""

import numpy as np
import pytest
from nki_sim import load as load_tile
from nki_sim import nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import SimParams, load, parameters, record
from nxd_cp.simulators.nki_api import isa as every_isa
from nxd_cp.simulators.nki_api.isa import enums

SHAPES = SimParams(values=False)
X = normal(128, 64)


def _attention(generation):
    """The log of one causal head, and its outputs."""
    kernels = load("nxd_cp.kernels", generation=generation)
    q, k, v = (normal(1, 1, 256, 64, seed=seed) for seed in range(3))
    with record() as log:
        o, lse, _ = kernels.flash_fwd.flash_fwd(q, k, v, "causal", 0.125)
    return log, o, lse


@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
def test_shape_only_mode_logs_the_same_instructions(generation):
    full, o, lse = _attention(generation)
    with parameters(SHAPES):
        shapes, o_empty, lse_empty = _attention(generation)
    assert list(shapes) == list(full)
    assert shapes.buffers == full.buffers
    assert (o_empty.shape, o_empty.dtype) == (o.shape, o.dtype)
    assert np.isfinite(o).all()
    assert np.isnan(o_empty).all()
    assert np.isnan(lse_empty).all()
    assert lse_empty.shape == lse.shape


def _everything(x):
    """Every instruction once, on gen4."""
    tile, other, column = load_tile(x), load_tile(x), load_tile(x[:, 0:1])
    out, eight, bank = sbuf((128, 64)), sbuf((128, 8)), psum((64, 64))
    index, small = sbuf((128, 8), nl.uint32), sbuf((128, 8), nl.uint16)
    mask = sbuf((128, 64), nl.uint8)
    command = nisa.reduce_cmd.reset_reduce
    nisa.memset(index, 0)
    nisa.memset(small, 0)
    nisa.memset(mask, 1)
    state = sbuf((128, 6), nl.uint32)
    nisa.activation(out, nl.log, tile, bias=column, scale=column)
    nisa.activate2(out, nl.exp, tile, column, 1.0, nl.multiply, nl.add)
    nisa.set_rng_seed(index[0:1, 0:1])
    nisa.rng(mask)
    nisa.rand2(out, 0.0, 1.0)
    nisa.dropout(out, tile, 0.5)
    nisa.rand_get_state(state)
    nisa.rand_set_state(state)
    nisa.memset(mask, 1)
    nisa.sequence_bounds(sbuf((1, 2, 64)), tile[0:1])
    nisa.activation_reduce(out, nl.exp, tile, nl.add, column)
    nisa.affine_select(out, [[1, 64]], 1, tile, 0.0)
    nisa.bn_stats(eight[:, 0:6], tile)
    nisa.bn_aggr(eight[:, 6:8], eight[:, 0:6])
    nisa.dma_compute(out, [tile, other], nl.add)
    nisa.dma_transpose(sbuf((64, 128)), tile)
    nisa.exponential(out, tile, column, column, command)
    nisa.iota(index, [[1, 8]])
    nisa.local_gather(sbuf((128, 128)), tile, small)
    nisa.max8(eight, tile)
    nisa.nc_find_index8(index, tile, eight)
    nisa.nc_match_replace8(out, tile, eight, 0.0, index)
    nisa.nc_matmul(bank, tile, other)
    nisa.nc_matmul(bank, tile, other)
    nisa.nc_n_gather(eight, tile, index)
    nisa.nc_stream_shuffle(out, tile, [0] * 32)
    nisa.nc_transpose(psum((64, 128)), tile)
    nisa.nonzero_with_count(sbuf((128, 65), nl.int32), tile)
    nisa.range_select(out, tile, nl.less, nl.less, column, column, reduce_res=column)
    nisa.reciprocal(out, tile)
    nisa.scalar_tensor_tensor(out, tile, nl.multiply, column, nl.add, other)
    nisa.select_reduce(out, mask, tile, column, column, command)
    nisa.tensor_copy(out, tile)
    nisa.tensor_copy_predicated(out, tile, mask)
    nisa.tensor_partition_reduce(out[0:1], nl.max, tile)
    nisa.tensor_reduce(column, nl.add, tile, axis=1)
    nisa.tensor_scalar(mask, mask, nl.bitwise_and, 3)
    nisa.tensor_scalar(out, tile, nl.multiply, column, op1=nl.add, operand1=2.0)
    nisa.tensor_scalar_cumulative(out, tile, nl.multiply, nl.add, column)
    nisa.tensor_scalar_reduce(out, tile, nl.add, column, nl.max, column)
    nisa.tensor_tensor(out, tile, other, nl.add)
    nisa.tensor_tensor_scan(out, tile, other, column, nl.multiply, nl.add)
    return store(out)


def test_no_instruction_needs_values(monkeypatch):
    """No value is converted to be stored, and none is looked at: a log of NaN warns otherwise."""
    x = np.full((128, 64), np.nan, np.float32)
    with record() as full:
        run(_everything, normal(128, 64) ** 2 + 1, generation="gen4")
    monkeypatch.setattr("nxd_cp.simulators.nki_api.dtypes.store_f32", None)
    monkeypatch.setattr(np, "matmul", None)
    with parameters(SHAPES), record() as shapes:
        run(_everything, x, generation="gen4")
    assert list(shapes) == list(full)
    instructions = {n for n in every_isa.__all__ if n not in vars(enums)}
    helpers = {
        "NkiInstruction",
        "NkiValidationError",
        "VirtualRegister",
        "constants",
        "get_nc_version",
        "get_nc_sub_version",
    }
    helpers |= {n for n in instructions if n.startswith("register_")}  # tested with loops
    helpers |= {"core_barrier", "sendrecv"}  # tested in test_nki_ranks.py
    used = {r.opcode for r in shapes} | {"activation_reduce"}
    assert instructions - helpers == used


def test_checks_hold_without_values():
    def unwritten(x):
        nisa.tensor_copy(sbuf(x.shape), sbuf(x.shape))  # bad

    def shapes(x):
        nisa.tensor_tensor(sbuf((128, 32)), load_tile(x), load_tile(x), nl.add)  # bad

    with parameters(SHAPES):
        rejects("memory.uninitialised", unwritten, X)
        rejects("operand.shapes", shapes, X)
