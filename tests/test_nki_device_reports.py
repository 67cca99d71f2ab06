"""Programs that the vendor's simulator runs and a device or compiler rejects, as users report them.

Each row: what the report is about, the rule that catches it here, the bad kernel with its
generation, and a good twin. A rule of the documented tier raises; one of the inferred tier warns
and raises when strict. Sources are those of the rules.
"""

import warnings

import numpy as np
import pytest
from nki_sim import load, nisa, nl, normal, psum, run, sbuf, store

from nxd_cp.simulators.nki_api import RULES, NkiSimulatorWarning, NkiValidationError

X = normal(128, 128)


def _offset_from_a_register(instruction):
    def kernel(x):
        view = load(x).ap(
            [[128, 128], [1, 8]], scalar_offset=nisa.register_alloc(4), indirect_dim=1
        )
        instruction(sbuf((128, 8)), view)

    return kernel


def _dynamic_dma(x):
    view = x.ap([[128, 128], [1, 8]], scalar_offset=nisa.register_alloc(4), indirect_dim=1)
    nisa.dma_copy(sbuf((128, 8)), view)


def _loops(nested):
    def inner(i):
        nl.fori_loop(0, 2, _nothing)

    def kernel(x):
        nl.fori_loop(0, 2, inner if nested else _nothing)

    return kernel


def _nothing(i):
    pass


def _copy_on(engine):
    def kernel(x):
        nisa.tensor_copy(sbuf(x.shape), load(x), engine=engine)

    return kernel


def _dma(mode):
    def kernel(x):
        nisa.dma_copy(sbuf(x.shape), x, dge_mode=mode)

    return kernel


def _matmul(dtype=nl.float32, columns=128, **options):
    def kernel(x):
        tile = load(x)
        nisa.nc_matmul(psum((columns, 128), dtype), tile[:, 0:columns], tile, **options)

    return kernel


def _register_store(x):
    nisa.register_store(sbuf((1, 1), nl.int32), nisa.register_alloc(3))


def _scaled_by(dtype):
    def kernel(x):
        factor = sbuf((128, 1), dtype)
        nisa.memset(factor, 2.0)
        nisa.tensor_scalar(sbuf(x.shape), load(x), nl.multiply, factor)

    return kernel


def _half(start, count=64):
    def kernel(x):
        tile = load(x)
        nisa.tensor_copy(sbuf((count, 128)), tile[start : start + count])

    return kernel


def _float8(value):
    def kernel(x):
        tile = sbuf((4, 4), nl.float8_e4m3)
        nisa.memset(tile, value)

    return kernel


def _remainder(x):
    nl.mod(load(x), 2.0)


def _layout(partitions):
    def kernel(x):
        nisa.memset(nl.ndarray((partitions, 8), dtype=nl.float32), 0.0)

    return kernel


def _fills(columns):
    def kernel(x):
        nisa.memset(sbuf((128, columns)), 0.0)

    return kernel


def _placed(at):
    def kernel(x):
        one = nl.ndarray((128, 16), nl.float32, nl.sbuf, address=(0, 0))
        two = nl.ndarray((128, 16), nl.float32, nl.sbuf, address=(0, at))
        nisa.memset(one, 1.0)
        nisa.memset(two, 2.0)
        nisa.reciprocal(sbuf((128, 16)), one)

    return kernel


def _onto_sbuf(x):
    nisa.nc_matmul(sbuf((128, 128)), load(x), load(x))


def _gpsimd(where):
    def kernel(x):
        tile = where((128, 128))
        nisa.memset(tile, 0.0)
        nisa.affine_select(sbuf((128, 128)), [[1, 128]], 0, tile, 0.0)

    return kernel


hwdge, swdge = nisa.dge_mode.hwdge, nisa.dge_mode.swdge
scalar, vector = nisa.engine.scalar, nisa.engine.vector
tiled = {"tile_position": (0, 0), "tile_size": (128, 32)}
wide = {"tile_position": (0, 0), "tile_size": (128, 64)}
ROWS = [
    ("operand at a register's offset", "operand.run_time_address", "gen2",
     _offset_from_a_register(nisa.reciprocal), _dynamic_dma),
    ("copy at a register's offset", "tensor_copy.run_time_address", "gen2",
     _offset_from_a_register(nisa.tensor_copy), _dynamic_dma),
    ("nested device loops", "loop.nested", "gen3", _loops(True), _loops(False)),
    ("ScalarE copy", "instruction.generation", "gen2", _copy_on(scalar), _copy_on(vector)),
    ("hardware descriptors", "dma_copy.mode", "gen2", _dma(hwdge), _dma(swdge)),
    ("bf16 result of a matmul", "nc_matmul.dst_dtype", "gen2", _matmul(nl.bfloat16), _matmul()),
    ("register_store", "register_store.gen2", "gen2", _register_store, _dynamic_dma),
    ("bf16 operand0", "operand.per_partition", "gen3",
     _scaled_by(nl.bfloat16), _scaled_by(nl.float32)),
    ("64 partitions from 32", "operand.partition_start", "gen3", _half(32), _half(64)),
    ("stationary tile of 32 columns", "nc_matmul.tile", "gen2",
     _matmul(columns=32, **tiled), _matmul(columns=32, **wide)),
    ("float8_e4m3 above 240", "float8.range", "gen3", _float8(300.0), _float8(240.0)),
    ("fmod and mod", "language.not_on_device", "gen3", _remainder, _copy_on(vector)),
    ("256 partitions", "memory.partitions", "gen3", _layout(256), _layout(128)),
    ("capacity overflow", "memory.capacity", "gen2", _fills(48 * 1024), _fills(32 * 1024)),
    ("overlapping placed tensors", "memory.overwritten", "gen3", _placed(32), _placed(64)),
    ("accumulating onto fresh PSUM", "nc_matmul.accumulate_first", "gen3",
     _matmul(accumulate=True), _matmul(accumulate=False)),
    ("matmul into SBUF", "nc_matmul.memory", "gen3", _onto_sbuf, _matmul()),
    ("GpSimdE reading PSUM", "operand.tile", "gen3", _gpsimd(psum), _gpsimd(sbuf)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "generation", "bad", "good"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_a_reported_program_is_caught_and_its_twin_is_not(rule, generation, bad, good):
    if RULES[rule].tier == "documented":
        with pytest.raises(NkiValidationError, match=f"rule {rule} "):
            run(bad, X, generation=generation)
    else:
        with pytest.warns(NkiSimulatorWarning, match=f"rule {rule} "):
            run(bad, X, generation=generation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(good, X, generation=generation)


def test_fewer_than_128_contracted_rows_are_accepted():
    """The reverse: hardware takes K below 128, an early simulator did not."""

    def kernel(x):
        out, tile = psum((128, 128)), load(x[0:40])
        nisa.nc_matmul(out, tile, tile)
        return store(out)

    x = np.round(X[:40])
    np.testing.assert_array_equal(run(kernel, np.round(X)), x.T @ x)
