"""The machine: what waits for what, shared ports, warm-up; determinism; bounds in order."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nxd_cp.simulators.timing import Options, Program, constants_for, estimate, replay
from nxd_cp.simulators.timing.critical import critical_path, stalls, time_by_line, time_by_tag
from nxd_cp.simulators.timing.streams.attention import attention
from nxd_cp.simulators.timing.streams.builder import Stream
from nxd_cp.simulators.timing.streams.conv import depthwise_conv
from nxd_cp.simulators.timing.streams.dynamic import dynamic_loads
from nxd_cp.simulators.timing.streams.matmul import matmul

ROOT = Path(__file__).parent.parent


def _time(stream, generation="gen3", **options):
    options.setdefault("order", "program")
    values = constants_for(generation).at("expected")
    return replay(Program(stream.log, generation, values, Options(**options)))


def _data_is_respected(line):
    """Every read starts after the writes that it needs, by the machine's own edges."""
    return all(
        line.start[record] >= line.end[before]
        for record, edges in enumerate(line.program.edges)
        for before, kind in edges
        if kind == "data"
    )


def test_equal_logs_give_equal_times_to_the_last_bit():
    first, second = (attention(512, "bfloat16", fused=True) for _ in range(2))
    a, b = estimate(first, "gen3"), estimate(second, "gen3")
    assert repr(a.timeline.start) == repr(b.timeline.start)
    assert repr(a.timeline.end) == repr(b.timeline.end)
    assert (a.bound_ns, a.expected_ns, a.pessimistic_ns) == (
        b.bound_ns,
        b.expected_ns,
        b.pessimistic_ns,
    )


DIGEST = """
import hashlib, json
from nxd_cp.simulators.timing import estimate
from nxd_cp.simulators.timing.streams.attention import attention
from nxd_cp.simulators.timing.trace import document
times = estimate(attention(256, "bfloat16", fused=False), "gen3")
text = json.dumps(document({"core": times.timeline})) + repr((times.bounds, times.pessimistic_ns))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_another_process_gives_the_same_times_byte_for_byte():
    def digest(seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", DIGEST]
        found = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=60
        )
        return found.stdout

    first, second = digest(1), digest(2)
    assert len(first.strip()) == 64
    assert first == second


@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
@pytest.mark.parametrize(
    "log",
    [
        attention(512, "bfloat16", fused=True),
        matmul("full", 2048, 1024, 1024),
        depthwise_conv(1, 128, 256),
        dynamic_loads(64, 128),
    ],
    ids=["attention", "products", "small instructions", "loads"],
)
def test_bound_expected_and_pessimistic_are_in_order(log, generation):
    times = estimate(log, generation)
    assert times.bound_ns == max(times.bounds.values())
    assert 0 < times.bound_ns < times.expected_ns < times.pessimistic_ns


@pytest.mark.parametrize("order", ["program", "list"])
def test_no_read_starts_before_its_data_is_there(order):
    log = attention(512, "bfloat16", fused=False)
    values = constants_for("gen3").at("expected")
    line = replay(Program(log, "gen3", values, Options(order=order)))
    assert _data_is_respected(line)


def test_a_read_before_its_data_is_caught():
    log = attention(512, "bfloat16", fused=True)
    line = estimate(log, "gen3").timeline
    waiting = next(i for i, kind in enumerate(line.wait_kind) if kind == "data")
    line.start[waiting] = 0.0
    assert not _data_is_respected(line)


def test_a_reader_waits_for_bytes_or_for_the_whole_tensor():
    s = Stream()
    tile, out = s.sbuf(128, 1024, dtype="float32"), s.sbuf(128, 512, dtype="float32")
    s.vector("memset", tile[:, :512])
    s.scalar("exp", tile[:, 512:], s.sbuf(128, 512, dtype="float32"))
    s.gpsimd("affine_select", out, tile[:, :512])
    by_byte, by_tensor = _time(s), _time(s, granularity="tensor")
    assert by_byte.start[2] < by_byte.end[1]
    assert by_tensor.start[2] >= by_tensor.end[1]


def _through_hbm(granularity, parts=2):
    """Two stores to one tensor and a load of the first; (its start, the end of the last store)."""
    s = Stream()
    kept = s.hbm(parts * 128, 4096, dtype="float32")
    for part in range(parts):
        s.dma(kept[part * 128 : (part + 1) * 128], s.sbuf(128, 4096, dtype="float32"))
    s.load(kept[:128])
    line = _time(s, granularity=granularity)
    return line.start[parts], line.end[parts - 1]


def test_a_compiler_of_the_older_language_waits_for_the_whole_tensor_in_hbm():
    start, stored = _through_hbm("byte")
    assert start < stored
    start, stored = _through_hbm("fenced")
    assert start >= stored


def test_a_fence_in_hbm_leaves_bytes_on_chip_alone():
    s = Stream()
    tile, out = s.sbuf(128, 1024, dtype="float32"), s.sbuf(128, 512, dtype="float32")
    s.vector("memset", tile[:, :512])
    s.scalar("exp", tile[:, 512:], s.sbuf(128, 512, dtype="float32"))
    s.gpsimd("affine_select", out, tile[:, :512])
    line = _time(s, granularity="fenced")
    assert line.start[2] < line.end[1]


def test_a_ninth_psum_bank_waits_for_the_first():
    s = Stream()
    w, x = s.sbuf(128, 128), s.sbuf(128, 512)
    banks = [s.psum(128, 512) for _ in range(9)]
    for bank in banks:
        s.matmul(bank, w, x)
        s.vector("tensor_copy", s.sbuf(128, 512), bank)
    line = _time(s)
    ninth = 2 * 8
    assert (1, "bank") in line.program.edges[ninth]
    assert line.start[ninth] >= line.end[1]
    assert not any(kind == "bank" for _, kind in line.program.edges[ninth - 2])


def test_a_tile_beyond_the_capacity_of_sbuf_waits_for_room():
    s = Stream()
    big = [s.sbuf(128, 80 * 1024, dtype="uint8") for _ in range(3)]
    for tile in big:
        s.vector("memset", tile)
        s.scalar("copy", s.sbuf(128, 1, dtype="float32"), tile[:, :1])
    assert any(kind == "space" for _, kind in _time(s, "gen2").program.edges[4])


def test_vector_and_scalar_exclude_each_other_in_psum_on_gen2_only():
    s = Stream()
    for engine in ("vector", "scalar"):
        bank = s.psum(128, 512)
        s.matmul(bank, s.sbuf(128, 128), s.sbuf(128, 512))
        if engine == "vector":
            s.vector("tensor_copy", s.sbuf(128, 512), bank)
        else:
            s.scalar("copy", s.sbuf(128, 512), bank)
    for generation, apart in (("gen2", True), ("gen3", False)):
        line = _time(s, generation)
        assert (line.start[3] >= line.free[1]) is apart
        assert (line.wait_kind[3] == "port") is apart


def test_vector_and_gpsimd_exclude_each_other_in_sbuf_on_gen2_only():
    s = Stream()
    s.vector("memset", s.sbuf(128, 4096, dtype="float32"))
    s.gpsimd("iota", s.sbuf(128, 64, dtype="float32"))
    for generation, apart in (("gen2", True), ("gen3", False)):
        line = _time(s, generation)
        first, second = sorted(range(2), key=lambda i: line.start[i])
        assert (line.start[second] >= line.free[first]) is apart


def test_tensor_engine_warms_up_and_cools_down():
    s = Stream()
    w, x = s.sbuf(128, 128), s.sbuf(128, 512)
    banks = [s.psum(128, 512) for _ in range(8)]
    slow = s.sbuf(128, 8192, dtype="float32")
    for i in range(40):
        s.matmul(banks[i % 8], w, x, add=i >= 8)
    s.vector("memset", slow)
    s.vector("tensor_tensor", slow, slow, slow)
    s.vector("tensor_copy", w[:, :1], slow[:, :1])
    s.matmul(banks[0], w, x, add=True)
    line = _time(s)
    assert {0, 1} <= line.cold
    assert not {38, 39} & line.cold
    assert 43 in line.cold
    assert _time(s, "gen2").cold == set()


def test_a_function_change_loads_a_table_and_copies_do_not():
    s = Stream()
    tile = s.sbuf(128, 512, dtype="float32")
    for function in ("exp", "copy", "exp", "log"):
        s.scalar(function, tile, tile)
    line = _time(s)
    assert set(line.table_load) == {0, 3}
    assert line.table_load[3] == constants_for("gen3").table_load.expected


def test_a_device_loop_iteration_is_a_barrier():
    s = Stream()
    s.vector("memset", s.sbuf(128, 4096, dtype="float32"))
    s.loop_iteration()
    s.scalar("copy", s.sbuf(128, 1, dtype="float32"), s.sbuf(128, 1, dtype="float32"))
    line = _time(s)
    extra = constants_for("gen3").loop_iteration.expected
    assert line.start[2] >= line.end[0] + extra


def test_software_descriptors_queue_on_one_generator():
    s = Stream()
    source, target = s.hbm(128, 64), s.hbm(128, 64)
    s.load(source)
    s.dma(target, s.sbuf(128, 64))
    issue = constants_for("gen2").dma_software_issue.expected
    one, many = _time(s, "gen2"), _time(s, "gen2", dma_queues="line")
    assert one.start[1] - one.start[0] >= issue
    assert many.start[1] == many.start[0]


def test_critical_path_covers_the_total_without_gaps():
    line = estimate(attention(512, "bfloat16", fused=False), "gen3").timeline
    path = critical_path(line)
    assert path[0].begin_ns == 0.0
    assert path[-1].end_ns == line.total_ns
    assert all(a.end_ns == b.begin_ns for a, b in itertools.pairwise(path))
    assert sum(ns for *_, ns in time_by_line(line)) == pytest.approx(line.total_ns)
    assert sum(time_by_tag(line).values()) == pytest.approx(line.total_ns)


def test_guesses_count_for_nothing_on_trn2_and_for_most_on_trn3():
    log = attention(512, "bfloat16", fused=True)
    assert estimate(log, "gen3").guess_share < 0.01
    assert estimate(log, "gen4").guess_share > 0.5


def test_busy_and_idle_add_up_to_the_total():
    line = estimate(matmul("full", 2048, 1024, 1024), "gen3").timeline
    for queue, causes in stalls(line).items():
        assert sum(causes.values()) + line.resource_busy[queue] == pytest.approx(line.total_ns)


def _same_engine_order_is_kept(line):
    """An engine that may reorder never overtakes its own earlier access to the same bytes."""
    return all(
        line.start[record] >= line.free[before]
        for record, edges in enumerate(line.program.edges)
        for before, kind in edges
        if kind == "engine"
    )


def test_an_engine_that_reorders_keeps_the_order_of_its_own_writes():
    s = Stream()
    tile, slow = s.sbuf(128, 64, dtype="float32"), s.sbuf(128, 64, dtype="float32")
    s.gpsimd("iota", slow)
    s.vector("tensor_copy", tile, slow)
    s.vector("memset", tile)
    line = _time(s, order="list")
    assert (1, "engine") in line.program.edges[2]
    assert line.start[2] >= line.free[1]
    assert _same_engine_order_is_kept(line)
    line.start[2] = 0.0
    assert not _same_engine_order_is_kept(line)


def test_an_engine_may_take_a_ready_instruction_before_one_that_waits():
    s = Stream()
    slow = s.sbuf(128, 2048, dtype="float32")
    s.gpsimd("iota", slow)
    s.vector("tensor_copy", s.sbuf(128, 2048, dtype="float32"), slow)
    s.vector("memset", s.sbuf(128, 64, dtype="float32"))
    strict, free = _time(s), _time(s, order="list")
    assert strict.start[2] > strict.start[1]
    assert free.start[2] < free.start[1]


def test_every_part_of_a_tile_waits_for_the_room_that_it_takes():
    s = Stream()
    old, source = s.sbuf(128, 120 * 1024, dtype="uint8"), s.hbm(128, 100 * 1024, dtype="uint8")
    s.vector("memset", old)
    s.scalar("copy", s.sbuf(128, 1, dtype="float32"), old[:, :1])
    new = s.sbuf(128, 2, 50 * 1024, dtype="uint8")
    for half in range(2):
        part = slice(half * 50 * 1024, (half + 1) * 50 * 1024)
        s.dma(new[:, half], source[:, part])
    edges = _time(s, "gen2", order="list").program.edges
    assert all((1, "space") in edges[record] for record in (2, 3))
