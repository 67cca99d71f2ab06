"""Several ranks and cores timed together: they wait for each other, and for nothing else."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from nki_sim import nisa, nl, sbuf
from perfetto_reader import read

from nxd_cp.simulators.nki_api import Kernel, record, simulate_ranks
from nxd_cp.simulators.nki_api import collectives as ncc
from nxd_cp.simulators.timing import constants_for, estimate, estimate_cores, program
from nxd_cp.simulators.timing.critical import critical_path, time_by_line, time_by_tag
from nxd_cp.simulators.timing.trace import document

X = np.zeros((128, 512), np.float32)
RANKS = 4
ALL = ncc.ReplicaGroup([list(range(RANKS))])


def hbm(shape, name):
    return nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm, name=name)


def work(tile, times):
    for _ in range(times):
        nisa.tensor_scalar(tile, tile, op0=nl.multiply, operand0=2.0)


def reduced(x, times):
    """Some work, then a sum over the group; what follows waits for it."""
    src, dst, out = hbm(x.shape, "src"), hbm(x.shape, "dst"), hbm(x.shape, "out")
    tile = sbuf(x.shape, x.dtype)
    nisa.dma_copy(tile, x)
    work(tile, times)
    nisa.dma_copy(src, tile)
    ncc.all_reduce(srcs=[src], dsts=[dst], replica_group=ALL, op=nl.add)
    nisa.dma_copy(out, dst)
    return out


def pair(x):
    """Core 0 works on more columns; both pass a barrier and read what the other wrote."""
    middle, out = hbm((256, 512), "middle"), hbm((256, 64), "out")
    core = nl.program_id(0)
    width = 512 if core == 0 else 64
    tile, other = sbuf((128, width), x.dtype), sbuf((128, 64), x.dtype)
    nisa.dma_copy(tile, x[:, :width])
    work(tile, 50)
    nisa.dma_copy(middle[core * 128 : core * 128 + 128, :width], tile)
    nisa.core_barrier(middle, cores=(0, 1))
    nisa.dma_copy(other, middle[128 - core * 128 : 256 - core * 128, :64])
    nisa.dma_copy(out[core * 128 : core * 128 + 128], other)
    return out


def beside(x):
    """A sum over the group, and a load that has nothing to do with it."""
    src, dst, out = hbm(x.shape, "src"), hbm(x.shape, "dst"), hbm(x.shape, "out")
    first, second = sbuf(x.shape, x.dtype), sbuf(x.shape, x.dtype)
    nisa.dma_copy(first, x)
    nisa.dma_copy(src, first)
    ncc.all_reduce(srcs=[src], dsts=[dst], replica_group=ALL, op=nl.add)
    for _ in range(20):
        nisa.dma_copy(second, x)
    nisa.dma_copy(out, second)
    return out


def test_a_collective_takes_its_share_of_the_dma_rate(monkeypatch):
    large = np.zeros((128, 4096), np.float32)
    with record() as log:
        simulate_ranks(beside, [(large,)] * RANKS, generation="gen3")

    def moved():
        line = estimate_cores(log, "gen3")[0, 0].timeline
        return line.resource_busy["dma core rate"], max(end for _, end in line.transfer.values())

    sent = log.exchanges[0].bytes_sent / constants_for("gen3").at("expected").dma_core_rate
    busy, last = moved()
    alone = program.collective_cost
    monkeypatch.setattr(program, "collective_cost", lambda *a: replace(alone(*a), dma=0.0))
    busy_alone, last_alone = moved()
    assert busy - busy_alone == pytest.approx(sent)
    assert 0 < last - last_alone <= sent  # less where the rate was idle anyway


def ranks_log(times):
    with record() as log:
        simulate_ranks(reduced, [(X, n) for n in times], generation="gen3")
    return log


@pytest.fixture(scope="module")
def uneven():
    return estimate_cores(ranks_log([1, 1, 1, 60]), "gen3")


def _of(times, opcode):
    line = times.timeline
    (found,) = [i for i, name in enumerate(line.program.opcodes) if name == opcode]
    return line, found


def test_a_collective_starts_on_all_ranks_when_the_last_one_is_there(uneven):
    starts = {
        _of(times, "all_reduce")[0].start[_of(times, "all_reduce")[1]] for times in uneven.values()
    }
    assert len(starts) == 1
    line, found = _of(uneven[3, 0], "all_reduce")
    assert line.wait_kind[found] == "data"
    for rank in range(3):
        line, found = _of(uneven[rank, 0], "all_reduce")
        assert line.wait_kind[found] == "meeting"


def test_a_collective_takes_start_hops_and_bytes(uneven):
    c = constants_for("gen3").at("expected")
    line, found = _of(uneven[0, 0], "all_reduce")
    sent = 2 * (RANKS - 1) / RANKS * X.nbytes
    expected = c.collective_start + 2 * c.collective_hop + sent / c.collective_rate
    assert line.end[found] - line.start[found] == pytest.approx(expected)


def test_what_reads_a_collectives_result_waits_for_it(uneven):
    line, found = _of(uneven[0, 0], "all_reduce")
    after = [i for i in range(found + 1, len(line.program)) if line.program.queues[i] != "sync"]
    assert after
    assert all(line.start[i] >= line.end[found] for i in after)


def test_the_critical_path_of_an_early_rank_says_that_it_waited(uneven):
    times = uneven[0, 0]
    pieces = critical_path(times.timeline)
    assert pieces[0].begin_ns == 0.0
    assert pieces[-1].end_ns == times.expected_ns
    assert all(a.end_ns == b.begin_ns for a, b in pairwise(pieces))
    waited = {file: ns for file, _, ns in time_by_line(times.timeline)}["waiting for other cores"]
    last_store = [
        max(one.timeline.end[: _of(one, "all_reduce")[1]]) for one in (times, uneven[3, 0])
    ]
    assert waited == pytest.approx(last_store[1] - last_store[0])
    assert waited > 59 * 512 / 0.96 / 2  # 59 more instructions, two elements a cycle
    assert sum(time_by_tag(times.timeline).values()) == pytest.approx(times.expected_ns)


def test_equal_ranks_end_together_and_an_even_start_waits_for_nobody():
    times = estimate_cores(ranks_log([5] * RANKS), "gen3")
    assert len({one.expected_ns for one in times.values()}) == 1
    assert all(not one.timeline.meetings for one in times.values())


def test_a_barrier_holds_what_reads_shared_hbm_until_the_other_core_wrote_it():
    with record() as log:
        Kernel(pair, "gen3")[2](X)
    times = estimate_cores(log, "gen3")
    first, second = times[0, 0].timeline, times[0, 1].timeline
    stores = [i for i, queue in enumerate(first.program.queues) if queue == "dma store"]
    wrote = first.end[stores[0]]
    loads = [i for i, queue in enumerate(second.program.queues) if queue == "dma load"]
    assert second.start[loads[-1]] >= wrote
    assert second.start[loads[0]] < wrote


def swapped(x):
    """The cores of a pair swap tiles; core 0 works on more columns first."""
    core = nl.program_id(0)
    out = hbm((256, 512), "out")
    tile, other = sbuf(x.shape, x.dtype), sbuf(x.shape, x.dtype)
    nisa.dma_copy(tile, x)
    width = 512 if core == 0 else 64
    work(tile[:, :width], 50)
    nisa.sendrecv(tile, other, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0)
    nisa.dma_copy(out[core * 128 : core * 128 + 128], other)
    return out


def test_a_sendrecv_is_a_dma_that_starts_on_both_cores_when_both_are_there():
    with record() as log:
        Kernel(swapped, "gen3")[2](X)
    times = estimate_cores(log, "gen3")
    (first, one), (second, two) = (_of(times[0, core], "sendrecv") for core in range(2))
    assert first.start[one] == second.start[two]
    assert second.wait_kind[two] == "meeting"
    begin, end = first.transfer[one]
    assert end - begin >= X.nbytes / constants_for("gen3").at("expected").dma_core_rate
    stored = max(i for i, opcode in enumerate(second.program.opcodes) if opcode == "dma_copy")
    assert second.start[stored] >= second.end[two]


def test_a_missing_member_is_caught():
    log = ranks_log([1] * RANKS)
    with pytest.raises(ValueError, match="expected those of all 4 members of a meeting, got 1"):
        estimate(log, "gen3")


def test_a_trace_has_a_process_per_rank_and_core_and_a_lane_for_collectives(uneven):
    trace = document({f"rank {r} core {c}": one.timeline for (r, c), one in uneven.items()})
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"]
    assert [name for name in names if name.startswith("rank")] == [
        f"rank {rank} core 0" for rank in range(RANKS)
    ]
    assert names.count("collectives") == RANKS
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] == "all_reduce"]
    assert [e["args"]["group"] for e in slices] == [list(range(RANKS))] * RANKS
    assert slices[0]["args"]["waited_ns"] > slices[3]["args"]["waited_ns"] == 0.0


def test_arrows_lead_from_the_last_rank_to_those_that_waited(uneven):
    trace = document({f"rank {rank}": one.timeline for (rank, _), one in uneven.items()})
    _, arrows, dropped = read(trace)
    assert not dropped
    across = [(tail, head) for tail, head in arrows if tail["pid"] != head["pid"]]
    assert sorted(head["pid"] for _, head in across) == [0, 1, 2]
    assert {tail["pid"] for tail, _ in across} == {3}
    assert {e["name"] for pair in across for e in pair} == {"all_reduce"}


def test_the_same_logs_give_the_same_times_byte_for_byte(uneven):
    again = estimate_cores(ranks_log([1, 1, 1, 60]), "gen3")
    for place, times in uneven.items():
        assert again[place].timeline.start == times.timeline.start
        assert again[place].timeline.end == times.timeline.end
