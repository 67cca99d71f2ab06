"""The NKI kernels in the simulator: special blocks, rings, and what is refused.

The generated cases and the planted faults are in test_kernel_suite.py.
Letters: S query rows, K keys; Hq and Hkv query and key/value heads; D head dim of q and k, E of v.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from budgets import assert_close, assert_within_budget
from cases import NAMES, Case, cut, inputs, join_all, one_device, truth
from kernel_cases import KernelCase, by_kernels, check, exact, problem
from kernel_shapes import Total, exceeded, run_shapes, whole_rectangle
from torch import Tensor

from nxd_cp.attention import ring_attention
from nxd_cp.backends import kernel_blocks, kernel_limits
from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.kernel_limits import Launch
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.context import CPContext
from nxd_cp.schedule import Bounded
from nxd_cp.simulators.nki_api import NkiSimulatorWarning, NkiValidationError, load, record
from nxd_cp.simulators.nki_api.chips import CHIPS, PSUM_BYTES

GENERATIONS = ("gen2", "gen3", "gen4")
STATIC = ("full", "causal", "strict")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mask", ["causal", "band"])
def test_logits_of_thirty_thousand_neither_overflow_nor_lose_a_row(
    generation: str, mask: str
) -> None:
    case = KernelCase(generation, mask, S=300, K=300, gain=9000.0)
    assert float(exact(case, problem(case))[1].abs().max()) > 3e4
    check(case)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_row_that_sees_nothing_is_zero_and_has_zero_gradients(generation: str) -> None:
    case = KernelCase(generation, "strict", S=128, K=128)
    o, lse, (dq, dk, dv) = by_kernels(case, problem(case))
    assert not o[:, :, 0].any()
    assert not dq[:, :, 0].any()
    assert bool((lse[:, :, 0] == -torch.inf).all())
    assert not dk[:, :, -1].any()
    assert not dv[:, :, -1].any()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_that_are_empty_in_the_whole_sequence_add_nothing(generation: str) -> None:
    x = problem(KernelCase(generation, "causal", S=130, K=130))
    lse = torch.full((1, 2, 130), -torch.inf)
    rows = QueryRows(x.do, x.q, x.do, lse, torch.zeros_like(lse))
    grads = KernelBackend("simulate", generation).backward(rows, x.k, x.v, Scores("causal", 1.0))
    for found in grads:
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_carry_that_has_seen_nothing_changes_nothing(generation: str) -> None:
    case = KernelCase(generation, "strict", S=130, K=130)
    x, backend = problem(case), KernelBackend("simulate", generation)
    scores = Scores("strict", case.scale)
    o, lse, statistics = backend.forward(x.q, x.k, x.v, scores)
    empty = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    again = backend.forward(x.q, x.k, x.v, scores, empty)
    for found, expected in zip(again, (o, lse, statistics), strict=True):
        assert torch.equal(found, expected)


def last_of_many_keys(score: float) -> Tensor:
    """lse of 2**24 keys of one score, of which the carry has seen all but 128."""
    ones, seen = torch.ones(1, 1, 128, 16), 2.0**24 - 128
    statistics = torch.tensor([0.0, math.exp(score) * seen]).expand(1, 1, 128, 2)
    carry = ones, statistics[..., 1].log(), statistics
    backend = KernelBackend("simulate", "gen3", score_bound=score)
    return backend.forward(ones, ones * score / 16, ones, Scores("full", 1.0), carry)[1]


@pytest.mark.filterwarnings("error")
def test_the_sum_of_bounded_scores_stays_in_the_range_of_log() -> None:
    """At the bound, over as many keys as a block may have."""
    lse = last_of_many_keys(kernel_limits.MAX_SCORE_BOUND)
    truth = kernel_limits.MAX_SCORE_BOUND + math.log(kernel_limits.MAX_INDEX)
    assert_close("lse", lse, torch.full(lse.shape, truth, dtype=torch.float64), 2.0**-23 * truth)


def test_a_bound_that_lets_the_sum_leave_the_range_of_log_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_limits, "MAX_SCORE_BOUND", 32.0)
    with pytest.warns(NkiSimulatorWarning, match=r"nl.log of values"):
        last_of_many_keys(32.0)


RINGS = [
    Case(layout=layout, size=size, causal=causal, S=512, Hq=2, Hkv=1, D=32, dtype=dtype)
    for layout, size, causal, dtype in (
        ("zigzag", 2, True, torch.float32),
        ("zigzag", 2, True, torch.bfloat16),
        ("striped", 2, True, torch.float32),
        ("striped", 4, True, torch.bfloat16),
        ("contiguous", 4, True, torch.float32),
        ("contiguous", 2, False, torch.float32),
    )
]


def ring(case: Case, generation: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """o, dq, dk, dv from a ring of threads whose blocks the simulated kernels compute."""
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)

    def on_each_rank(cp: CPContext) -> tuple[Tensor, ...]:
        q, k, v, do = (cut(x, case, cp.rank).clone() for x in inputs(case))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = ring_attention(*leaves, cp=cp, causal=case.causal, backend="simulate")
        o.backward(do)
        return (o.detach(), *(x.grad for x in leaves))

    group = CPContext.local(case.size, layout=case.layout)
    return join_all(group.run(on_each_rank), case)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", RINGS, ids=str)
def test_a_ring_of_simulated_kernels_is_fp64_attention(
    case: Case, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ring(case, generation, monkeypatch)
    for name, x, y, z in zip(NAMES, found, truth(case), one_device(case), strict=True):
        assert_within_budget(name, x, y, z)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_only_gen2_transposes_with_the_identity(generation: str) -> None:
    case = KernelCase(generation, "causal", S=128, K=128)
    with record() as log:
        by_kernels(case, problem(case))
    opcodes = log.counts()
    assert ("nc_transpose" in opcodes) == (generation != "gen2")
    assert opcodes["nc_matmul"] > 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_another_packing_is_the_same_program(generation: str) -> None:
    """Interval masks are data: the instructions do not depend on them."""
    programs = []
    for low in (-10, -100):
        case = KernelCase(generation, S=200, K=200)
        x, backend = problem(case), KernelBackend("simulate", generation)
        with record() as log:
            backend.forward(x.q, x.k, x.v, Scores(Bounded(low, 0), 1.0))
        programs.append([(r.opcode, r.dst, r.sources, r.flags) for r in log])
    assert programs[0] == programs[1]


def test_a_static_mask_issues_nothing_for_tiles_that_nobody_sees() -> None:
    counts = {}
    for mask in ("full", "causal"):
        x = problem(KernelCase("gen3", mask, S=1024, K=1024, Hq=1))
        with record() as log:
            KernelBackend("simulate", "gen3").forward(x.q, x.k, x.v, Scores(mask, 1.0))
        counts[mask] = log.counts()["nc_matmul"]
    assert counts["causal"] < 0.7 * counts["full"]


# How a rectangle is cut into launches.


@pytest.mark.parametrize("mask", ["full", "causal", "strict", "window", "band", "offset"])
def test_a_rectangle_cut_into_many_launches_is_the_same(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_limits, "SBUF_BYTES", 40 * 1024)
    monkeypatch.setattr(kernel_blocks, "MAX_INSTRUCTIONS", 700)
    monkeypatch.setattr(kernel_limits, "MAX_INSTRUCTIONS", 700)
    keys = 640 if mask in ("causal", "strict") else 900
    case = KernelCase("gen3", mask, B=2, Hq=6, Hkv=2, S=640, K=keys, D=32, E=48, sink=True)
    launch = Launch(3, 640, keys, 32, 48, 4, mask if mask in STATIC else "interval")
    blocks = kernel_blocks.split(launch, 4)
    assert len(blocks) >= 12
    assert len({(b.rows.start, b.keys.start) for b in blocks}) > 2
    check(case)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("mask", ["full", "causal", "strict"])
@pytest.mark.parametrize("size", [5, 128, 700, 3000])
def test_the_blocks_of_a_rectangle_hold_every_visible_pair_once(
    heads: int, mask: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_limits, "SBUF_BYTES", 20 * 1024)
    count = torch.zeros(2, heads, size, size, dtype=torch.int)
    for block in kernel_blocks.split(Launch(heads, size, size, 32, 32, 2, mask), 2):
        part = torch.ones(block.rows.stop - block.rows.start, block.keys.stop - block.keys.start)
        if block.mask != "full":
            assert part.shape[0] == part.shape[1], "a static mask is square"
            part = part.tril(0 if block.mask == "causal" else -1)
        count[block.groups, block.heads, block.rows, block.keys] += part.int()
    expected = torch.ones(size, size)
    if mask != "full":
        expected = expected.tril(0 if mask == "causal" else -1)
    assert torch.equal(count, expected.int().expand_as(count))


LONG = [
    Launch(1, 32768, 32768, 128, 128, 2, "causal"),
    Launch(8, 32768, 32768, 128, 128, 2, "causal"),
    Launch(1, 32768, 32768, 128, 128, 4, "interval"),
    Launch(16, 1000, 32768, 256, 256, 4, "full"),
    Launch(128, 4096, 4096, 192, 128, 2, "strict"),
]


@pytest.mark.parametrize("launch", LONG, ids=str)
def test_long_blocks_are_cut_until_a_launch_fits(launch: Launch) -> None:
    cut = kernel_blocks.cut_to_fit(launch)
    assert kernel_limits.fits(cut)
    assert not kernel_limits.fits(launch)
    doubled = replace(cut, rows=2 * cut.rows, keys=2 * cut.keys, heads=2 * cut.heads)
    assert not kernel_limits.fits(doubled), "no smaller than needed"


SHORT = [
    Launch(2, 300, 300, 64, 64, 4, "causal"),
    Launch(1, 1, 1, 16, 16, 2, "full"),
    Launch(3, 1024, 1024, 128, 128, 2, "causal"),
    Launch(4, 513, 700, 192, 256, 2, "interval", softcap=True),
]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("launch", SHORT, ids=str)
def test_the_estimates_of_a_launch_hold_and_are_not_far_off(
    launch: Launch, generation: str
) -> None:
    found = run_shapes(launch, generation)
    for cost, (instructions, sbuf) in zip(found, (FORWARD, BACKWARD), strict=True):
        assert cost.instructions <= instructions(launch) <= 2 * cost.instructions + 100
        assert cost.sbuf <= sbuf(launch)


FORWARD = kernel_limits.forward_instructions, kernel_limits.forward_bytes
BACKWARD = kernel_limits.backward_instructions, kernel_limits.backward_bytes


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mask", ["causal", "interval"])
def test_a_long_rectangle_never_exceeds_sbuf_or_psum(mask: str, generation: str) -> None:
    """Up to 32768 rows: scripts/kernel_sizes.py."""
    launch = Launch(1, 4096, 4096, 128, 128, 2, mask)
    for total in whole_rectangle(launch, generation):
        assert total.launches == len(kernel_blocks.split(launch, 1))
        assert 0 < total.sbuf <= kernel_limits.SBUF_BYTES <= CHIPS[generation].sbuf_usable_bytes
        assert 0 < total.psum <= PSUM_BYTES
        assert total.longest <= kernel_limits.MAX_INSTRUCTIONS


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (Total(1, 10, 10, 180_224, 16_384), ""),
        (Total(1, 10, 10, 180_225, 0), "SBUF: 180225 of 180224 bytes per partition"),
        (Total(1, 10, 10, 0, 16_385), "PSUM: 16385 of 16384 bytes per partition"),
        (Total(2, 50_000, 40_001, 0, 0), "instructions: 40001 of 40000"),
    ],
    ids=["fits", "sbuf", "psum", "instructions"],
)
def test_what_a_launch_exceeds_is_named(total: Total, message: str) -> None:
    assert exceeded(total, CHIPS["gen2"].sbuf_usable_bytes) == message


def test_the_table_of_sizes_has_a_row_for_every_chip_and_direction() -> None:
    script = Path(__file__).parent.parent / "scripts" / "kernel_sizes.py"
    command = [sys.executable, str(script), "--lengths", "200", "--masks", "causal"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for generation in GENERATIONS:
        rows = [line for line in said.splitlines() if generation in line]
        assert [("fwd" in row, "bwd" in row) for row in rows] == [(True, False), (False, True)]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_launch_that_was_not_cut_is_caught(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_blocks, "fits", lambda launch: True)
    with pytest.raises(NkiValidationError, match=r"memory\.capacity"):
        whole_rectangle(Launch(1, 128, 65536, 128, 128, 4, "full"), generation)


REFUSED = [
    ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
    ({"D": 264}, "head dim of at most 256"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_the_kernels_cannot_take_is_refused_before_any_message(
    change: dict[str, object], message: str
) -> None:
    shape = {"S": 256, "Hq": 2, "Hkv": 1, "D": 64, "dtype": torch.float32, **change}

    def on_each_rank(cp: CPContext) -> tuple[str, int]:
        q, k, v = (
            torch.empty(1, shape[h], shape["S"], shape["D"], dtype=shape["dtype"])
            for h in ("Hq", "Hkv", "Hkv")
        )
        with pytest.raises(ValueError, match=message) as caught:
            ring_attention(q, k, v, cp=cp, backend="simulate")
        return str(caught.value), cp.transport.counters.ring_messages

    for text, messages in CPContext.local(2, layout="contiguous").run(on_each_rank):
        assert "expected" in text
        assert "got" in text
        assert messages == 0


LIMITS = [
    ({}, {"softcap": -1.0}, "softcap from 1e-20 to 1000000.0, got -1.0"),
    ({}, {"softcap": 1e-38}, "softcap from 1e-20 to 1000000.0, got 1e-38"),
    ({}, {"scale": 1e-21}, "scale from 1e-20 to 1000000.0, got 1e-21"),
    ({}, {"softcap": 2e6}, "to 1000000.0, got 2000000.0; a larger one changes nothing: pass None"),
    ({}, {"scale": 2e6}, "got 2000000.0; move the factor into q, or use backend=.torch."),
    ({"D": 257}, {}, "at most 256 .two contractions of 128., got 257 for q and k; use backend="),
    ({"cores": 2}, {"generation": "gen2"}, "cores=1, or 2 from gen3 .trn2., got 2 on gen2"),
    ({"cores": 2}, {"generation": "inf2"}, "2 from gen3 .trn2., got 2 on gen2; pass cores=1"),
    ({"cores": 3}, {}, "cores=1, or 2 from gen3 .trn2., got 3; pass cores=1"),
    ({"K": 9}, {"mask": "causal"}, 'as many keys as rows under the mask "causal", got 9 and 8; s'),
    ({"K": 9}, {"mask": "strict"}, "got 9 and 8; say which with nxd_cp.schedule.Bounded"),
    ({}, {"mask": "casual"}, "a mask .full., .causal. or .strict., got 'casual'; others are a"),
    ({"Hq": 3, "G": 2}, {}, "key/value heads that divide query heads, got 2 and 3"),
    ({"B": 2}, {}, r"equal batch and head dim, got \(1, 2, 8, 64\) and \(2, 1, 8, 64\)"),
    ({"K": 0}, {}, r"expected no empty dim, got shape \(1, 1, 0, 64\)"),
    ({"V": 7}, {}, "k and v: expected equal shapes but for the head dim"),
    ({"cores": 2, "Hq": 3}, {}, "multiple of the 2 cores of a launch, got 1 and 3"),
    ({"score_bound": 60.0}, {}, "score_bound above 0 and at most 27.0, got 60.0"),
    ({"score_bound": 8.0, "dtype": torch.float16}, {}, "no score_bound with float16"),
    ({"dtype": torch.float64}, {}, "all float32, got q in torch.float64; cast it"),
    ({"E": 300}, {}, "at most 256 .two contractions of 128., got 300 for v"),
]


@pytest.mark.parametrize(("change", "options", "message"), LIMITS, ids=lambda x: str(x)[:30])
def test_every_limit_names_itself_the_value_and_the_way_out(
    change: dict[str, object], options: dict[str, object], message: str
) -> None:
    shape = {"Hq": 2, "G": 1, "B": 1, "K": 8, "D": 64, "E": 64, "cores": 1, **change}
    given = {"mask": "full", "scale": 1.0, "generation": "gen3", **options}
    generation, groups, keys = given.pop("generation"), shape["G"], shape["K"]
    sizes = (
        (1, shape["Hq"], 8, shape["D"]),
        (shape["B"], groups, keys, shape["D"]),
        (shape["B"], groups, shape.get("V", keys), shape["E"]),
    )
    q, k, v = (torch.zeros(size, dtype=shape.get("dtype", torch.float32)) for size in sizes)
    with record() as log, pytest.raises(ValueError, match=message):
        KernelBackend(
            "simulate", generation, cores=shape["cores"], score_bound=shape.get("score_bound")
        ).forward(q, k, v, Scores(**given))
    assert len(log) == 0


BESIDE = [
    ("lse", (1, 2, 7), r"expected lse of shape \(1, 2, 8\) beside q of .*, got \(1, 2, 7\); cut"),
    ("o", (1, 2, 8, 16), r"expected o of shape \(1, 2, 8, 32\) beside"),
    ("statistics", (1, 2, 8), r"expected statistics of shape \(1, 2, 8, 2\) beside"),
    ("do", (1, 1, 8, 32), r"expected do of shape \(1, 2, 8, 32\) beside"),
    ("delta", (1, 2, 8, 1), r"expected delta of shape \(1, 2, 8\) beside"),
    ("dq", (1, 2, 8, 32), r"expected dq of shape \(1, 2, 8, 16\) beside"),
    ("dk", (1, 2, 8, 16), r"expected dk of shape \(1, 1, 8, 16\) beside"),
]


@pytest.mark.parametrize(("name", "shape", "message"), BESIDE, ids=lambda x: str(x)[:20])
def test_what_stands_beside_q_has_its_shape(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    shapes = {"q": (1, 2, 8, 16), "k": (1, 1, 8, 16), "v": (1, 1, 8, 32), "o": (1, 2, 8, 32)}
    rows = {"do": (1, 2, 8, 32), "lse": (1, 2, 8), "delta": (1, 2, 8), "statistics": (1, 2, 8, 2)}
    grads = {"dq": (1, 2, 8, 16), "dk": (1, 1, 8, 16), "dv": (1, 1, 8, 32)}
    x = {n: torch.zeros(s) for n, s in {**shapes, **rows, **grads, name: shape}.items()}
    backend, scores = KernelBackend("simulate", "gen3"), Scores("full", 1.0)
    beside = QueryRows(x["do"], x["q"], x["o"], x["lse"], x["delta"])
    calls = {
        "forward": lambda: backend.forward(
            x["q"], x["k"], x["v"], scores, (x["o"], x["lse"], x["statistics"])
        ),
        "backward": lambda: backend.backward(
            beside, x["k"], x["v"], scores, (x["dq"], x["dk"], x["dv"])
        ),
    }
    found = {"o": ("forward",), "statistics": ("forward",), "lse": ("forward", "backward")}
    directions = found.get(name, ("backward",))
    for direction in directions:
        with record() as log, pytest.raises(ValueError, match=message):
            calls[direction]()
        assert len(log) == 0


@pytest.mark.parametrize(
    ("mask", "keys", "bounds", "message"),
    [
        ("casual", 8, 0, "casual"),
        ("interval", 8, 0, "bounds go with"),
        ("causal", 8, 4, "bounds go with"),
        ("strict", 9, 0, "as many keys as rows"),
    ],
)
def test_a_kernel_called_by_itself_drops_no_mask(
    mask: str, keys: int, bounds: int, message: str
) -> None:
    package = load("nxd_cp.kernels", generation="gen3")
    q, k = torch.zeros(1, 1, 8, 16).numpy(), torch.zeros(1, 1, keys, 16).numpy()
    row, given = torch.zeros(1, 1, 8, 1).numpy(), (torch.zeros(1, 8, 1).numpy(),) * bounds
    with pytest.raises(AssertionError, match=message):
        package.flash_fwd.flash_fwd(q, k, k, mask, 1.0, bounds=given)
    with pytest.raises(AssertionError, match=message):
        package.flash_bwd.flash_bwd(q, q, k, k, row, row, mask, 1.0, bounds=given)


def test_more_rows_than_fp32_can_count_are_refused_under_an_interval_mask() -> None:
    with pytest.raises(ValueError, match=r"fewer than 16777216 rows and keys .* use more ranks"):
        kernel_limits.check_lengths("nki", 2**24, 128)


def test_dropout_is_refused_with_the_reason() -> None:
    x = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match="no generator gives equal masks"):
        ring_attention(x, x, x, dropout_p=0.1, backend="simulate")


SIMULATED_NKI = """
from nxd_cp.simulators.nki_api import install
from nxd_cp.backends.neuron import KernelBackend
install()
import nki.language
try:
    KernelBackend("nki")
except ValueError as error:
    print(error)
"""


def test_the_device_backend_takes_neither_a_missing_nor_a_simulated_nki() -> None:
    with pytest.raises(ValueError, match="AWS Neuron SDK"):
        KernelBackend("nki")
    with pytest.raises(ValueError, match=r'expected no generation for backend "nki", got .gen3.'):
        KernelBackend("nki", "gen3")
    said = subprocess.run([sys.executable, "-c", SIMULATED_NKI], capture_output=True, text=True)
    assert "AWS Neuron SDK" in said.stdout, said.stderr
