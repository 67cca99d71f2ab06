"""The simulated cluster: topology, hops, the ring against closed forms, extrapolation."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from perfetto_reader import read

from nxd_cp.schedule import make_plan
from nxd_cp.simulators.attention_block import KERNELS
from nxd_cp.simulators.cluster.cli import Ring, run_simulate
from nxd_cp.simulators.cluster.kernel_time import Rate, Timed
from nxd_cp.simulators.cluster.links import LAUNCH, LINKS
from nxd_cp.simulators.cluster.measure import kernel_log, time_kernel, timed_kernel
from nxd_cp.simulators.cluster.ring import Model, hop_times, simulate
from nxd_cp.simulators.cluster.topology import CHIPS_PER_NODE, Cluster
from nxd_cp.simulators.cluster.trace import document

LLAMA = Model(num_heads=32, num_kv_heads=8, head_dim=128)
TRN2_FORWARD = 535e3  # flops per ns of a chip: 85 % of its bf16 peak
CHIP = Cluster(generation="gen3", num_positions=8, tensor_parallel=4, lnc=2)


def _rate(flops_per_ns=TRN2_FORWARD, backward=False):
    return Rate(flops_per_ns, (10 if backward else 4) * LLAMA.head_dim * LLAMA.num_heads)


# The slowest hop of a trn2 ring by its size in chips, one channel: B/ns, and ns without the bytes.
SLOWEST_HOP = {8: (128.0, 1500.0), 64: (64.0, 1500.0), 512: (25.0, 15000.0)}


def _closed_form(plan):
    """ns: 4 s G D bytes a hop, 2 s s H D flops a zigzag step, by hand; LAUNCH is a guess."""
    rate, alpha = SLOWEST_HOP[plan.size]
    s = plan.local_len
    hop = LAUNCH.expected + alpha + 4 * s * 8 * 128 / rate
    return (plan.size - 1) * max(0.0, hop - 2 * s * s * 32 * 128 / TRN2_FORWARD)


@pytest.mark.parametrize(("positions", "pods"), [(8, False), (64, True)])
def test_exposed_communication_of_zigzag_meets_the_closed_form(positions, pods):
    cluster = replace(CHIP, num_positions=positions, pods=pods)
    for tokens in (positions * 1024, positions * 4096):
        plan = make_plan("zigzag", positions, tokens)
        times = simulate(plan, cluster, LLAMA, _rate())
        expected = _closed_form(plan)
        # The wait for the slowest hop is the closed form's; 1 us is one step's half-tile rounding.
        assert times.exposed_ns == pytest.approx(expected, rel=0.05, abs=1000)
    assert times.balance == pytest.approx(1, abs=1e-3)


def test_rings_of_8_64_and_512_chips_at_a_million_tokens_are_fast_and_meet_the_closed_form():
    begin = time.perf_counter()
    for positions in (8, 64, 512):
        cluster = replace(CHIP, num_positions=positions, pods=positions == 64)
        plan = make_plan("zigzag", positions, 2**20)
        times = simulate(plan, cluster, LLAMA, _rate())
        expected = _closed_form(plan)
        assert times.exposed_ns == pytest.approx(expected, rel=0.05, abs=1e4)
        assert 0 < times.efficiency <= 1
    assert expected > 0, "512 chips over EFA cannot hide their hops"
    assert time.perf_counter() - begin < 60


def test_without_messages_to_wait_for_the_ring_is_its_computing():
    plan = make_plan("contiguous", 8, 8 * 4096, causal=False)
    times = simulate(plan, CHIP, LLAMA, _rate(TRN2_FORWARD / 100))
    assert times.exposed_ns == pytest.approx(0, abs=1)
    assert times.total_ns == pytest.approx(times.compute_ns)
    assert times.efficiency == pytest.approx(1)


def test_a_contiguous_causal_ring_is_out_of_balance_and_zigzag_is_not():
    kernel = _rate(TRN2_FORWARD / 100)
    plans = {name: make_plan(name, 8, 8 * 2048) for name in ("contiguous", "zigzag", "striped")}
    times = {name: simulate(plan, CHIP, LLAMA, kernel) for name, plan in plans.items()}
    assert times["contiguous"].balance > 1.8
    assert times["zigzag"].balance < 1.01
    assert times["zigzag"].total_ns < 0.6 * times["contiguous"].total_ns
    assert times["striped"].balance < 1.01


def test_one_position_has_no_messages():
    plan = make_plan("zigzag", 1, 4096)
    times = simulate(plan, replace(CHIP, num_positions=1), LLAMA, _rate())
    assert times.exposed_ns == 0
    assert times.efficiency == pytest.approx(1)


def test_backward_waits_for_the_gradients_to_come_home():
    plan = make_plan("zigzag", 8, 8 * 8192)
    times = simulate(plan, CHIP, LLAMA, _rate(TRN2_FORWARD / 10, backward=True), backward=True)
    hop = max(hop_times(CHIP, LLAMA.grad_bytes(plan.local_len), channels=1, level="expected"))
    assert times.exposed_ns == pytest.approx(hop, rel=0.01)


def test_more_channels_and_a_lower_level_never_take_longer():
    plan = make_plan("zigzag", 8, 8 * 512)
    by_channels = [
        simulate(plan, CHIP, LLAMA, _rate(), channels=channels).total_ns for channels in (1, 2, 4)
    ]
    assert by_channels == sorted(by_channels, reverse=True)
    by_level = [
        simulate(plan, CHIP, LLAMA, _rate(), level=level).total_ns
        for level in ("low", "expected", "high")
    ]
    assert by_level == sorted(by_level)
    assert by_level[0] < by_level[2]


def test_any_ring_order_gives_the_same_times_on_equal_links():
    order = (0, 3, 1, 2, 7, 5, 6, 4)
    plain = simulate(make_plan("zigzag", 8, 8 * 1024), CHIP, LLAMA, _rate())
    mixed = simulate(make_plan("zigzag", 8, 8 * 1024, ring_order=order), CHIP, LLAMA, _rate())
    assert mixed.total_ns == pytest.approx(plain.total_ns, rel=0.02)


def test_a_kernel_that_fills_the_dma_engines_is_slowed_by_messages():
    plan = make_plan("zigzag", 8, 8 * 8192)
    free, busy = (
        simulate(plan, CHIP, LLAMA, replace(_rate(), dma_share=share)).total_ns
        for share in (0.0, 1.0)
    )
    assert busy > 1.01 * free


def test_guesses_count_by_what_the_time_rests_on():
    hidden = simulate(make_plan("zigzag", 8, 8 * 8192), CHIP, LLAMA, _rate(TRN2_FORWARD / 10))
    assert hidden.guess_share == pytest.approx(1)  # an assumed rate is a guess
    known = replace(_rate(TRN2_FORWARD * 100), guess_share=0.0)
    exposed = simulate(make_plan("zigzag", 8, 8 * 8192), CHIP, LLAMA, known)
    assert 0 < exposed.guess_share < 0.05  # the launch of a hop is one, the link is documented


def test_a_ring_simulated_twice_is_equal_to_the_last_bit():
    first, second = (
        simulate(make_plan("zigzag", 8, 8 * 1024), CHIP, LLAMA, _rate()) for _ in range(2)
    )
    assert np.array_equal(first.start, second.start)
    assert np.array_equal(first.end, second.end)


def test_a_walk_through_neighbours_visits_every_chip_of_a_node_and_closes():
    """What the places of a ring stand on: up the first column, a snake through the rest."""
    walk = [(0, 0)]
    for row in range(4):
        walk += [(row, column) for column in ((1, 2, 3) if row % 2 == 0 else (3, 2, 1))]
    walk += [(row, 0) for row in (3, 2, 1)]
    assert len(set(walk)) == len(walk) == CHIPS_PER_NODE["gen2"] == CHIPS_PER_NODE["gen3"]
    for a, b in zip(walk, walk[1:] + walk[:1], strict=True):
        steps = [min((x - y) % 4, (y - x) % 4) for x, y in zip(a, b, strict=True)]
        assert sorted(steps) == [0, 1]


@pytest.mark.parametrize(
    ("cluster", "links"),
    [
        (replace(CHIP, num_positions=16), {"neuronlink"}),
        (replace(CHIP, num_positions=32), {"neuronlink", "efa"}),
        (replace(CHIP, num_positions=64, pods=True), {"neuronlink", "ultraserver"}),
        (replace(CHIP, num_positions=128, pods=True), {"neuronlink", "ultraserver", "efa"}),
        (replace(CHIP, num_positions=2, tensor_parallel=2), {"chip"}),
        (replace(CHIP, num_positions=8, tensor_parallel=64), {"efa"}),
        (Cluster(generation="gen2", num_positions=16, tensor_parallel=2), {"neuronlink"}),
        (
            Cluster(generation="gen4", num_positions=64, tensor_parallel=4, lnc=2),
            {"sled", "rack"},
        ),
    ],
)
def test_hops_take_the_links_of_the_machine(cluster, links):
    assert set(cluster.hop_links()) == links
    assert links <= set(LINKS[cluster.generation])


def test_a_hop_is_latency_plus_bytes_over_bandwidth():
    (hop, *_) = hop_times(CHIP, 128e6, channels=1, level="expected")
    link = LINKS["gen3"]["neuronlink"]
    assert hop == pytest.approx(LAUNCH.expected + link.alpha.expected + 1e6)


def test_a_position_sends_over_the_links_of_all_its_chips_and_one_on_half_a_chip_over_its_own():
    size = 128e6
    rates = {0.5: 180.0, 1: 128.0, 4: 4 * 128.0, 16: 16 * 25.0}  # chips: B/ns of the first hop
    for chips, rate in rates.items():
        cores = round(8 * chips)
        cluster = Cluster(generation="gen3", num_positions=4, tensor_parallel=cores // 2, lnc=2)
        (hop, *_) = hop_times(cluster, size, channels=1, level="expected")
        alpha = 15000.0 if chips == 16 else 1500.0
        assert hop == pytest.approx(LAUNCH.expected + alpha + size / rate)


@pytest.mark.parametrize("kernel", KERNELS)
def test_extrapolation_meets_a_size_run_in_full_within_one_percent(kernel):
    timed = timed_kernel(kernel, "gen3", heads_per_core=1, kv_heads_per_core=1)
    for q_len, k_len, mask in ((4096, 4096, "causal"), (4096, 4096, "full")):
        full = time_kernel(kernel, "gen3", q_len=q_len, k_len=k_len, mask=mask).expected_ns
        assert timed.rectangle_ns(q_len, k_len, mask) == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("generation", ["gen2", "gen3"])
def test_a_bound_is_extrapolated_by_resource_because_the_busiest_changes(generation):
    timed = timed_kernel(
        "flash_fwd", generation, heads_per_core=1, kv_heads_per_core=1, level="low"
    )
    full = time_kernel("flash_fwd", generation, q_len=4096, k_len=4096, mask="causal")
    found = timed.rectangle_ns(4096, 4096, "causal")
    assert found == pytest.approx(max(full.bounds.values()), rel=0.01)
    # At 128K the engines bind on every chip: four times the work per doubling, not twice.
    far = [timed.rectangle_ns(n, n, "full") for n in (2**17, 2**18)]
    assert far[1] / far[0] == pytest.approx(4, rel=0.01)


def test_a_bound_extrapolated_as_a_whole_is_caught():
    def bound(q_len, k_len, mask):
        times = time_kernel("flash_fwd", "gen3", q_len=q_len, k_len=k_len, mask=mask)
        return times.bound_ns

    whole = Timed(bound, small=1024, large=3072)
    full = time_kernel("flash_fwd", "gen3", q_len=4096, k_len=4096, mask="causal")
    found = whole.rectangle_ns(4096, 4096, "causal")
    assert abs(found / max(full.bounds.values()) - 1) > 0.01


def test_short_blocks_are_run_as_they_are():
    timed = timed_kernel("flash_bwd", "gen3", heads_per_core=1, kv_heads_per_core=1)
    short = time_kernel("flash_bwd", "gen3", q_len=256, k_len=256).expected_ns
    assert timed.rectangle_ns(256, 256, "full") == short


def test_extrapolation_from_wrong_sizes_is_caught():
    wrong = Timed(lambda q, k, mask: 1e4 + q * k**1.2, small=512, large=1024)
    exact = 1e4 + 4096 * 4096**1.2
    assert abs(wrong.rectangle_ns(4096, 4096, "full") / exact - 1) > 0.01


def test_trace_of_a_ring_has_a_lane_per_rank_and_steps_in_order():
    plan = make_plan("zigzag", 8, 8 * 1024)
    times = simulate(plan, CHIP, LLAMA, _rate())
    trace = document(plan, times)
    steps = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] == "compute"]
    assert len(steps) == 8 * 8
    mine = [e for e in steps if e["pid"] == 3]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-9 for a, b in itertools.pairwise(mine))
    assert max(e["ts"] + e["dur"] for e in steps) == pytest.approx(times.total_ns / 1e3, abs=1e-3)


@pytest.mark.parametrize(
    ("positions", "layout"), [(8, "zigzag"), (8, "contiguous"), (80, "zigzag")]
)
def test_perfetto_keeps_every_step_and_hop_of_a_ring_and_its_arrows(positions, layout):
    """Contiguous ranks run apart, and of 80 ranks 64 are drawn: not all arrows have a tail."""
    plan = make_plan(layout, positions, positions * 1024)
    cluster = replace(CHIP, num_positions=positions)
    trace = document(plan, simulate(plan, cluster, LLAMA, _rate()))
    slices, arrows, dropped = read(trace)
    assert not dropped
    steps = [step for rank in plan.steps[:64] for step in rank]
    sources = [step.kv.source for step in steps if step.kv and step.kv.source is not None]
    assert [e["cat"] for e in slices].count("compute") == len(steps)
    assert [e["cat"] for e in slices].count("message") == len(sources)
    assert len(arrows) == sum(source < 64 for source in sources)
    for tail, head in arrows:
        sent, needed = (int(e["name"].removeprefix("step ")) for e in (tail, head))
        assert needed == sent + 1
        assert tail["pid"] == (head["pid"] - 1) % positions


def test_the_command_prints_three_levels_both_ways(tmp_path):
    text = run_simulate(
        Ring(ranks=8, seq_len=8 * 1024, tflops=500.0), trace_path=tmp_path / "ring.json"
    )
    for words in (
        "guesses",
        "forward, bound",
        "backward, pessimistic",
        "neuronlink",
        "not measured",
    ):
        assert words in text
    assert (tmp_path / "ring.json").exists()


def test_the_command_prints_the_closed_form_beside_what_it_finds():
    """Two nodes over EFA: hops cannot be hidden, so both are far from zero."""
    text = run_simulate(Ring(ranks=32, seq_len=32 * 1024, tflops=535.0))
    (line,) = [line for line in text.splitlines() if line.startswith("forward, expected")]
    exposed, closed_form = map(float, line.split()[4:6])
    assert closed_form > 1
    assert exposed == pytest.approx(closed_form, rel=0.05)
    assert all(" - " in line for line in text.splitlines() if line.startswith("backward"))


def test_wrong_clusters_and_models_are_caught():
    with pytest.raises(ValueError, match="expected a divisor or a multiple of the 8 cores"):
        replace(CHIP, tensor_parallel=3, lnc=1)
    with pytest.raises(ValueError, match="lnc: expected 1, or 2 on gen3"):
        Cluster(generation="gen2", num_positions=2, tensor_parallel=1, lnc=2)
    for generation in ("gen2", "gen4"):
        with pytest.raises(ValueError, match=f"pods: expected False on {generation}, got True"):
            Cluster(generation=generation, num_positions=2, tensor_parallel=1, pods=True)
    with pytest.raises(ValueError, match="expected 8 ranks as in the cluster, got 4"):
        simulate(make_plan("zigzag", 4, 4096), CHIP, LLAMA, _rate())
    with pytest.raises(ValueError, match="channels: expected 1, 2 or 4, got 3"):
        simulate(make_plan("zigzag", 8, 4096), CHIP, LLAMA, _rate(), channels=3)
    with pytest.raises(ValueError, match="kernel: expected one of flash_fwd"):
        kernel_log("softmax", "gen3", q_len=128, k_len=128)
    with pytest.raises(ValueError, match="to divide heads_per_core, got 2 and 3"):
        timed_kernel("flash_fwd", "gen3", heads_per_core=3, kv_heads_per_core=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tflops": 0.0}, "tflops: expected a positive number, got 0"),
        ({"tflops": -3.0}, "tflops: expected a positive number, got -3"),
        ({"tflops": 50.0, "num_heads": 7}, "kv-heads: expected a divisor of 7 heads, got 8"),
    ],
)
def test_rings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_simulate(Ring(ranks=4, seq_len=4096, **options))
