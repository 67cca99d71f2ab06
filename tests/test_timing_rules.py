"""Cost rules one by one: every instruction has one, and each feature costs what is documented."""

import dataclasses
import types

import numpy as np
import pytest
from nki_sim import nisa, nl, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, record
from nxd_cp.simulators.nki_api import isa as simulated
from nxd_cp.simulators.nki_api.log import DOUBLE_ROW, SKIPPED, Exchange
from nxd_cp.simulators.timing import Options, Program, constants_for, estimate, gen3, replay
from nxd_cp.simulators.timing.access import Access
from nxd_cp.simulators.timing.collective import collective_cost
from nxd_cp.simulators.timing.constants import LEVELS
from nxd_cp.simulators.timing.cost import instruction_cost
from nxd_cp.simulators.timing.dma import transfer
from nxd_cp.simulators.timing.streams.builder import Stream
from nxd_cp.simulators.timing.streams.primitives import time

GEN2 = constants_for("gen2").at("expected")
GEN3 = constants_for("gen3").at("expected")
TILE = Access(
    buffer=0,
    space="sbuf",
    partitions=128,
    first_partition=0,
    elements=64,
    itemsize=4,
    is_float=True,
    box=((1, 0, 255),),
    low=0,
    high=256,
    run_bytes=256,
    inner_stride_bytes=4,
)
# Functions of nki.isa that issue no instruction that is logged.
SILENT = {
    "chip_for",
    "current_or_none",
    "get_nc_sub_version",
    "get_nc_version",
    "guarded",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "unsupported",
}
INSTRUCTIONS = sorted(
    name
    for name, value in vars(simulated).items()
    if isinstance(value, types.FunctionType) and not name.startswith("_") and name not in SILENT
)


def _has_rule(opcode):
    rules = [
        lambda engine=engine: instruction_cost(
            "gen3", opcode, engine, "exp", 0, 64, TILE, (TILE, TILE), GEN3
        )
        for engine in ("tensor", "vector", "scalar", "gpsimd")
    ]
    rules.append(lambda: transfer("gen3", opcode, "", 0, TILE, (TILE,), GEN3))
    for rule in rules:
        try:
            rule()
        except ValueError:
            continue
        return True
    return False


@pytest.mark.parametrize("opcode", INSTRUCTIONS)
def test_every_instruction_of_the_simulator_has_a_cost_rule(opcode):
    assert _has_rule(opcode)


def test_an_instruction_without_a_rule_is_caught():
    assert len(INSTRUCTIONS) > 40
    assert not _has_rule("warp_shuffle")


def held(flags=0, rows=128, columns=128, moving=512, dtype="bfloat16"):
    """ns for which one matmul holds TensorE on trn2."""
    s = Stream()
    bits = flags | rows % 128 << 8 | columns % 128 << 16
    a, b = s.sbuf(rows, columns, dtype=dtype), s.sbuf(rows, moving, dtype=dtype)
    s.log.add("nc_matmul", "tensor", s.psum(columns, moving), (a, b), moving, bits)
    return time(s.log, "gen3").program.costs[0].occupancy_ns


def test_a_double_row_matmul_takes_the_time_of_one_of_half_its_flops():
    assert held(DOUBLE_ROW, dtype="float8_e4m3") == held()


def test_tiles_of_the_array_run_side_by_side():
    assert held(rows=64) == pytest.approx(held() / 2)
    assert held(rows=32, columns=64) == pytest.approx(held() / 8)


def test_a_matmul_holds_the_engine_for_at_least_64_columns():
    assert held(moving=1) == held(moving=64) < held(moving=128)


def test_weights_are_loaded_behind_the_matmul_before_and_else_seen():
    s = Stream()
    w, x = s.sbuf(128, 128), s.sbuf(128, 512)
    s.vector("memset", x)
    for _ in range(2):
        s.matmul(s.psum(128, 512), w, x)
    line = time(s.log, "gen3")
    cold = 1 / GEN3.tensor_cold
    assert line.start[2] - line.start[1] == pytest.approx(held() * cold)
    seen = line.start[1] - line.end[0] - GEN3.semaphore
    assert seen == pytest.approx(128 / GEN3.weights_columns_per_cycle / GEN3.tensor_clock * cold)


def test_an_inner_stride_over_16_bytes_halves_the_rate_also_before_a_dim_of_one():
    def held(shape, strides):
        s = Stream()
        tile = dataclasses.replace(s.sbuf(128, 512, dtype="float32"), shape=shape, strides=strides)
        s.vector("tensor_copy", s.sbuf(*shape, dtype="float32"), tile)
        return time(s.log, "gen2").program.costs[0].occupancy_ns

    near = held((128, 64), (512, 1))
    assert held((128, 64), (512, 4)) == held((128, 64, 1), (512, 4, 1)) == near
    slow = near + 64 / GEN2.vector_clock
    assert held((128, 64), (512, 8)) == pytest.approx(slow)
    assert held((128, 64, 1), (512, 8, 1)) == pytest.approx(slow)


def test_reading_the_accumulator_takes_64_cycles_more_on_vector_and_scalar():
    def held(engine, read):
        s = Stream()
        tile, row = s.sbuf(128, 512, dtype="float32"), s.sbuf(128, 1, dtype="float32")
        if engine == "vector":
            s.vector("tensor_scalar", tile, tile, *[row] * read, read=read)
        else:
            s.scalar("exp", tile, tile, *[row] * read, read=read)
        return time(s.log, "gen3").program.costs[0].occupancy_ns

    assert held("vector", True) - held("vector", False) == pytest.approx(64 / 0.96)
    assert held("scalar", True) - held("scalar", False) == pytest.approx(64 / 1.2)


def test_gpsimd_takes_its_base_and_a_cycle_per_element():
    def busy(elements, opcode="iota"):
        cost = instruction_cost("gen3", opcode, "gpsimd", "", 0, elements, TILE, (), GEN3)
        return cost.occupancy_ns

    assert busy(512) == pytest.approx((150 + 512) / 1.2)
    assert busy(1024) - busy(512) == pytest.approx(512 / 1.2)
    assert busy(256, "sendrecv") == pytest.approx((150 + 256) / 1.2)


def test_a_dma_pays_its_trigger_its_start_its_packets_and_its_end():
    s = Stream()
    s.load(s.hbm(128, 2048))
    line = time(s.log, "gen3")
    cost, (first, last) = line.program.costs[0], line.transfer[0]
    assert line.free[0] - line.start[0] == GEN3.dma_hardware_issue
    assert first - line.start[0] == GEN3.dma_hardware_start
    assert line.end[0] - last == GEN3.dma_done
    packets = 128 * 4096 / 16 / 4096
    engine = packets * (GEN3.dma_packet + 4096 / GEN3.dma_engine_rate)
    assert cost.engine_ns == pytest.approx(engine)
    assert last - first == pytest.approx(max(engine, 128 * 4096 / GEN3.dma_core_rate))


def test_short_rows_make_more_packets_and_a_skipped_dma_moves_nothing():
    def engine_ns(row_bytes, bits=0):
        hbm = dataclasses.replace(
            TILE, space="hbm", partitions=1, elements=128 * 256, itemsize=2, run_bytes=row_bytes
        )
        chip = dataclasses.replace(TILE, elements=256, itemsize=2, run_bytes=512)
        return transfer("gen3", "dma_copy", "", bits, chip, (hbm,), GEN3).engine_ns

    assert engine_ns(256) - engine_ns(512) == pytest.approx(8 * GEN3.dma_packet)
    assert engine_ns(512, SKIPPED) == 0.0


@pytest.mark.parametrize(("size", "published"), [(4, 7.0), (512, 51.2), (4096, 226.25)])
def test_a_packet_on_trn1_takes_its_measured_time(size, published):
    """From the rows that the two lines were fitted on: 7 ns, 160 GB/s, 1810 ns for eight."""
    hbm = dataclasses.replace(TILE, space="hbm", partitions=1, elements=size, itemsize=1)
    hbm = dataclasses.replace(hbm, run_bytes=size)
    chip = dataclasses.replace(TILE, partitions=1, elements=size, itemsize=1)
    found = transfer("gen2", "dma_copy", "", 0, chip, (hbm,), GEN2)
    assert found.engine_ns == pytest.approx(published, rel=0.01)
    one_line = GEN2.dma_packet + size / GEN2.dma_engine_rate
    assert (found.engine_ns < 0.99 * one_line) == (size < 512)


@pytest.mark.parametrize(
    ("space", "share"), [("sbuf", "dma_transpose_share"), ("hbm", "dma_transpose_hbm_share")]
)
def test_a_transpose_by_dma_runs_at_its_share_of_the_rate_and_rests_on_it(space, share):
    chip = dataclasses.replace(TILE, elements=512, itemsize=2)
    turned = transfer(
        "gen3", "dma_transpose", "", 0, chip, (dataclasses.replace(chip, space=space),), GEN3
    )
    rate = GEN3.dma_core_rate * getattr(GEN3, share)
    assert turned.core_ns == pytest.approx(128 * 512 * 2 / rate)
    assert {name for name, _ in (*turned.core, *turned.engine)} == {share}


def scaled(x):
    tile = sbuf((128, 64), x.dtype)
    nisa.dma_copy(tile, x)
    nisa.activation(tile, nl.exp, tile)
    return store(tile)


def test_changing_any_cost_never_changes_a_result(monkeypatch):
    data = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)

    def run():
        with record() as log:
            out = Kernel(scaled, "gen3")(data)
        return out.tobytes(), list(log.rows), estimate(log, "gen3").expected_ns

    before = run()
    times = set()
    for name, constant in constants_for("gen3").items():
        slower = {level: constant.at(level) * 2 + 1 for level in LEVELS}
        changed = {name: dataclasses.replace(constant, **slower)}
        monkeypatch.setattr(gen3, "CONSTANTS", dataclasses.replace(gen3.CONSTANTS, **changed))
        constants_for.cache_clear()
        try:
            after = run()
        finally:
            monkeypatch.undo()
            constants_for.cache_clear()
        assert after[:2] == before[:2], name
        times.add(after[2])
    assert len(times) > 10  # costs do change times


def _tensor_work(s):
    """Matmuls until TensorE is warm, a short one, and transposes, all of fp32."""
    wide, square = s.sbuf(128, 512, dtype="float32"), s.sbuf(128, 128, dtype="float32")
    banks = [s.psum(128, 512) for _ in range(4)]
    for i in range(40):
        s.matmul(banks[i % 4], square, wide, add=i >= 4)
    s.matmul(banks[0], square, wide[:, :16], add=True)
    s.transpose(s.psum(128, 128), square)


def _engine_work(s):
    """Large and tiny instructions of the other engines, a chain, a strided view, a device loop."""
    tile, row = s.sbuf(128, 512, dtype="float32"), s.sbuf(128, 1, dtype="float32")
    s.vector("memset", tile)
    for _ in range(3):
        s.vector("tensor_copy", row, row)
        s.scalar("copy", row, row)
    s.vector("tensor_scalar", tile, tile, row, row, read=True)
    turned = dataclasses.replace(tile, shape=(128, 64, 8), strides=(512, 1, 64))
    s.vector("tensor_copy", s.sbuf(128, 64, 8, dtype="float32"), turned)
    s.scalar("exp", tile, tile, row, read=True)
    s.scalar("log", row, row)
    s.gpsimd("iota", tile)
    s.loop_iteration()


def _dma_work(s):
    """Long and short rows, both generators, transposes from both sides, and a sum."""
    tile, outside = s.sbuf(128, 8192), s.hbm(128, 8192)
    s.dma(tile, outside)
    s.dma(outside, tile, "swdge")
    s.dma(tile[:, :2], outside[:, :2])
    s.dma_transpose(s.sbuf(128, 128), tile[:, :128])
    s.dma_transpose(s.sbuf(128, 128), s.hbm(128, 128))
    s.log.add("dma_compute", "dma", tile, (tile, outside), tile.free)


GATHER = Exchange(0, 0, "all_gather", ((0, 0), (1, 0)), (), (), (), (), 4096, 4096, (0, 1), ())


def _times(generation, values):
    """All times of a bit of everything."""
    found = [collective_cost(GATHER, values)]
    found.append(instruction_cost(generation, "core_barrier", "all", "", 0, 0, None, (), values))
    for work in (_tensor_work, _engine_work, _dma_work):
        s = Stream()
        work(s)
        line = replay(Program(s.log, generation, values, Options()))
        found.append((line.start, line.free, line.end, line.total_ns))
    return found


@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
def test_every_constant_changes_some_time_unless_it_says_that_it_is_unused(generation):
    table = constants_for(generation)
    before = _times(generation, table.at("expected"))
    for name, constant in table.items():
        changed = [
            dataclasses.replace(constant, expected=value)
            for value in (constant.expected / 2, 2 * constant.expected + 1)
        ]
        has_effect = any(
            _times(generation, dataclasses.replace(table, **{name: one}).at("expected")) != before
            for one in changed
        )
        assert has_effect != constant.source.startswith("unused"), name
