"""iota, affine_select and dma_copy."""

import ml_dtypes
import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, psum, rejects, run, sbuf, store

from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError

X = normal(128, 4, 8)


def _affine(partitions, pattern, offset, multiplier):
    grids = np.meshgrid(*[np.arange(n) * s for s, n in pattern], indexing="ij")
    return offset + multiplier * np.arange(partitions).reshape(-1, *[1] * len(pattern)) + sum(grids)


@pytest.mark.parametrize("dtype", [nl.int32, nl.float32])
def test_iota(dtype):
    def kernel():
        tile = sbuf((128, 4, 8), dtype)
        nisa.iota(tile, [[-3, 4], [2, 8]], offset=5, channel_multiplier=7)
        return store(tile)

    assert (run(kernel) == _affine(128, [(-3, 4), (2, 8)], 5, 7)).all()


@pytest.mark.parametrize(
    ("op", "compare"),
    [(nl.greater_equal, np.greater_equal), (nl.equal, np.equal), (nl.less, np.less)],
)
def test_affine_select(op, compare):
    def kernel(x):
        out = sbuf(x.shape)
        nisa.affine_select(out, [[-1, 4], [-2, 8]], 1, load(x), -9.0, cmp_op=op, offset=-3)
        return store(out)

    keep = compare(_affine(128, [(-1, 4), (-2, 8)], -3, 1), 0)
    np.testing.assert_array_equal(run(kernel, X), np.where(keep, X, -9))


def test_affine_select_stays_in_sbuf_and_needs_a_fitting_pattern():
    def in_psum(x):
        tile = psum(x.shape)
        nisa.tensor_copy(tile, load(x))
        nisa.affine_select(sbuf(x.shape), [[1, 32]], 1, tile, 0.0)  # bad

    def pattern(x):
        nisa.affine_select(sbuf(x.shape), [[1, 31]], 1, load(x), 0.0)  # bad

    def operator(x):
        nisa.affine_select(sbuf(x.shape), [[1, 32]], 1, load(x), 0.0, cmp_op=nl.add)  # bad

    rejects("operand.tile", in_psum, X)
    rejects("affine.pattern", pattern, X)
    rejects("affine_select.cmp_op", operator, X)


def test_dma_casts_through_fp32_and_reshapes_in_row_major_order():
    def kernel(x):
        tile = sbuf((64, 64), nl.bfloat16)
        nisa.dma_copy(tile, x)
        return store(tile)

    assert (run(kernel, X) == X.reshape(64, 64).astype(ml_dtypes.bfloat16)).all()


def test_dma_reaches_any_partition():
    def kernel(x):
        tile = sbuf((128, 8))
        nisa.dma_copy(tile[3:67], x[0:64, 0, :])
        nisa.dma_copy(tile[67:128], x[64:125, 0, :])
        nisa.dma_copy(tile[0:3], x[125:128, 0, :])
        return store(tile)

    np.testing.assert_array_equal(run(kernel, X), np.roll(X[:, 0], 3, axis=0))


def test_dma_rules():
    def from_psum(x):
        tile = psum((128, 8))
        nisa.tensor_copy(tile, load(x[:, 0, :]))
        nisa.dma_copy(sbuf((128, 8)), tile)  # bad

    def sizes(x):
        nisa.dma_copy(sbuf((128, 8)), x)  # bad

    def with_options(dtype=nl.float32, **options):
        def kernel(x):
            nisa.dma_copy(sbuf((128, 4, 8), dtype), x, **options)  # bad

        return kernel

    rejects("dma_copy.memory", from_psum, X)
    rejects("dma_copy.elements", sizes, X)
    hardware = nisa.dge_mode.hwdge
    rejects("dma_copy.mode", with_options(dge_mode=hardware), X, generation="gen2")
    rejects("dma_copy.mode", with_options(dtype=nl.bfloat16, dge_mode=hardware), X)
    rejects("dma_copy.mode", with_options(engine=nisa.engine.sync), X)
    rejects("dma_copy.mode", with_options(priority=1), X, generation="gen3")
    run(with_options(dge_mode=hardware, engine=nisa.engine.sync), X)
    run(with_options(priority=3), X, generation="gen4")


def test_an_integer_for_an_enum_is_taken_with_a_warning():
    def kernel(x, mode):
        tile = sbuf(x.shape)
        nisa.dma_copy(tile, x, dge_mode=mode)
        return store(tile)

    x = normal(128, 8)
    with pytest.warns(NkiSimulatorWarning, match=r"rule instruction\.integer_enum "):
        assert (run(kernel, x, 3) == x).all()
    with pytest.raises(NkiValidationError, match=r"expected a member of nki\.isa\.dge_mode, got 9"):
        run(kernel, x, 9)
