"""The kernels that skip at run time: fp64 attention, other tiles for other data, one program.

Letters: S query rows, K keys; Hq and Hkv query and key/value heads; D head dim of q and k, E of v.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from cases import Case, join_all, one_device, one_rank, truth
from kernel_cases import KernelCase, by_kernels, check, exact, problem
from kernel_suite import INTERVALS, generate

from nxd_cp.backends import kernel_blocks, kernel_limits, kernel_loops
from nxd_cp.backends.base import QueryRows, Scores
from nxd_cp.backends.kernel_limits import Launch
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.context import CPContext
from nxd_cp.schedule import Bounded
from nxd_cp.simulators.nki_api import Log, NkiValidationError, load, record
from nxd_cp.simulators.nki_api.memory import HBM
from nxd_cp.simulators.nki_api.tensor import NkiTensor

GENERATIONS = ("gen2", "gen3", "gen4")
GENERATED = [
    replace(case, loops=True)
    for generation in GENERATIONS
    for _, case in generate(11, 0, generation)
    if case.mask in INTERVALS
][::12]


@pytest.mark.parametrize("case", GENERATED, ids=str)
def test_a_generated_case_and_its_gradients_are_those_of_fp64(case: KernelCase) -> None:
    check(case)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mask", INTERVALS)
def test_several_chunks_of_keys_and_rows(mask: str, generation: str) -> None:
    keys = 1100 if mask != "documents" else 600
    check(KernelCase(generation, mask, S=600, K=keys, Hq=3, D=32, E=48, loops=True))


@pytest.mark.filterwarnings("error::nxd_cp.simulators.nki_api.NkiSimulatorWarning")
@pytest.mark.parametrize("generation", GENERATIONS)
def test_hops_that_carry_dq_alone(generation: str) -> None:
    """As in a ring: dk and dv of a hop go on with the keys, and only dq stays.

    Rows that fill up a chunk warn of nothing either.
    """
    case = KernelCase(generation, "window", S=130, K=700, D=32, E=48, hops=3)
    found = []
    for loops in (False, True):
        x, backend = problem(case), KernelBackend("simulate", generation, device_loops=loops)
        carry, dq, parts = None, None, []
        hops = [(keys, Scores(mask, case.scale)) for keys, mask in x.pieces]
        for keys, scores in hops:
            carry = backend.forward(x.q, x.k[:, :, keys], x.v[:, :, keys], scores, carry)
        o, lse, _ = carry
        rows = QueryRows(x.do, x.q, o, lse, (x.do * o).sum(-1))
        for keys, scores in hops:
            dq, *keys_and_values = backend.backward(
                rows, x.k[:, :, keys], x.v[:, :, keys], scores, dq
            )
            parts.append(keys_and_values)
        dk, dv = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        found.append((o, lse, dq, dk, dv))
    truth = exact(case, problem(case))
    for one, other, true in zip(*found, (*truth[:2], *truth[2]), strict=True):
        assert_within_budget("loops", other, true, one)


def test_two_cores_share_the_heads() -> None:
    check(KernelCase("gen3", "window", S=300, K=700, Hq=4, Hkv=2, cores=2, loops=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_two_cores_turn_alike_where_their_batch_elements_are_packed_differently(seed: int) -> None:
    case = KernelCase("gen4", "documents", B=2, S=700, K=700, Hq=1, D=16, E=16, cores=2, loops=True)
    check(replace(case, seed=seed))


def run(low: int, high: int, loops: bool = True) -> tuple[Log, Log]:
    """Logs of both directions, 1024 rows and 4096 keys, row i seeing keys i + low to i + high."""
    case = KernelCase("gen3", S=1024, K=4096, Hq=1, D=32, E=32)
    x, backend = problem(case), KernelBackend("simulate", "gen3", device_loops=loops)
    scores = Scores(Bounded(low, high), case.scale)
    with record() as forward:
        o, lse, _ = backend.forward(x.q, x.k, x.v, scores)
    rows = QueryRows(x.do, x.q, o, lse, (x.do * o).sum(-1))
    with record() as backward:
        backend.backward(rows, x.k, x.v, scores)
    return forward, backward


def test_loops_turn_as_often_as_something_is_visible() -> None:
    """Rows 0-511 see keys 0-1023 and the others 512-1535: two chunks of 512 keys each, twice."""
    forward, backward = run(0, 512)
    assert forward.counts()["loop_iteration"] == 2 * 2 * 2
    tiles = 4 + 8 + 4  # row tiles of 128 that see the keys 0-511, 512-1023 and 1024-1535
    assert backward.counts()["loop_iteration"] == tiles


def test_a_narrow_window_costs_less_than_all_tiles_and_a_wide_one_more() -> None:
    for narrow, wide, plain in zip(run(0, 100), run(-5000, 5000), run(0, 100, False), strict=True):
        assert narrow.counts()["nc_matmul"] < 0.5 * plain.counts()["nc_matmul"]
        assert wide.counts()["nc_matmul"] > 0.9 * plain.counts()["nc_matmul"]


def test_the_program_is_the_same_for_every_mask() -> None:
    """Instructions of the source: each line and place that was ever run."""
    programs = [
        [{(r.file, r.line, r.opcode) for r in log if r.opcode != "loop_iteration"} for log in logs]
        for logs in (run(0, 100), run(300, 2000), run(-5000, 5000))
    ]
    assert programs[0] == programs[1] == programs[2]


def test_registers_move_addresses_in_hbm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = [], NkiTensor.ap

    def noted(self: NkiTensor, *pattern: Any, **options: Any) -> NkiTensor:
        if options.get("scalar_offset") is not None:
            found.append(self.space)
        return right(self, *pattern, **options)

    monkeypatch.setattr(NkiTensor, "ap", noted)
    run(0, 100)
    assert set(found) == {HBM}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_block_in_which_nobody_sees_anything_turns_no_loop(generation: str) -> None:
    package = load("nxd_cp.kernels", generation=generation)
    q, k = torch.randn(1, 1, 128, 32).numpy(), torch.randn(1, 1, 512, 32).numpy()
    rows, keys = torch.zeros(1, 128, 1).numpy(), torch.zeros(1, 512, 1).numpy()
    bounds = rows, rows, keys, keys
    with record() as log:
        o, lse, _ = package.loop_fwd.loop_fwd(q, k, k, "interval", 1.0, bounds=bounds)
        grads = package.loop_bwd.loop_bwd(
            q, q, k, k, lse, rows[:, None], "interval", 1.0, bounds=bounds
        )
    assert "loop_iteration" not in log.counts()
    assert not o.any()
    assert (lse <= -1e29).all()
    assert not any(x.any() for x in grads)


SHAPES = [
    Launch(1, 128, 512, 64, 64, 4, "interval", loops=True),
    Launch(3, 128, 512, 128, 128, 2, "interval", loops=True),
    Launch(4, 128, 512, 192, 256, 2, "interval", softcap=True, loops=True),
]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("launch", SHAPES, ids=str)
def test_the_estimates_of_a_launch_hold(launch: Launch, generation: str) -> None:
    """Every loop turns once: what runs is the program."""
    dtype = torch.bfloat16 if launch.itemsize == 2 else torch.float32
    q = torch.zeros(1, launch.heads, launch.rows, launch.head_dim, dtype=dtype)
    k = torch.zeros(1, 1, launch.keys, launch.head_dim, dtype=dtype)
    v = torch.zeros(1, 1, launch.keys, launch.value_dim, dtype=dtype)
    do = torch.zeros(1, launch.heads, launch.rows, launch.value_dim, dtype=dtype)
    row = torch.zeros(1, launch.heads, launch.rows)
    backend = KernelBackend("simulate", generation, device_loops=True)
    scores = Scores(Bounded(-128, 512), 1.0, 10.0 if launch.softcap else None)
    with record() as forward:
        backend.forward(q, k, v, scores, (do.float(), row))
    with record() as backward:
        backend.backward(QueryRows(do, q, do, row, row), k, v, scores)
    estimates = (
        (forward, kernel_limits.forward_instructions, kernel_limits.forward_bytes),
        (backward, kernel_limits.backward_instructions, kernel_limits.backward_bytes),
    )
    for log, instructions, sbuf in estimates:
        assert len(log) <= instructions(launch)
        tiles = [b for b in log.buffers if b.space == "sbuf"]
        top = max(b.address + b.row_bytes for b in tiles) - min(b.address for b in tiles)
        assert top <= sbuf(launch)


def test_long_blocks_are_few_launches() -> None:
    launch = Launch(1, 32768, 32768, 128, 128, 2, "interval")
    loops = kernel_blocks.split(replace(launch, loops=True), 1)
    assert len(loops) < len(kernel_blocks.split(launch, 1))


# Faults.


def turn_once_less(right: Any, module: ModuleType) -> Any:
    def wrong(*place: Any) -> Any:
        lower, upper, origin = right(*place)
        upper.value -= 1
        return lower, upper, origin

    return wrong


def begin_at_the_first_chunk(right: Any, module: ModuleType) -> Any:
    """The chunks are right, but not the index that they are said to begin at."""

    def wrong(*place: Any) -> Any:
        lower, upper, origin = right(*place)
        module.nisa.memset(dst=origin, value=0.0)
        return lower, upper, origin

    return wrong


def never_lower_the_bounds(right: Any, module: ModuleType) -> Any:
    return lambda dst, bound, by: right(dst, bound, 0.0 if isinstance(by, float) else by)


def load_the_bounds_of_the_first_chunk(right: Any, module: ModuleType) -> Any:
    def wrong(bounds: Any, b: int, size: int, index: Any) -> Any:
        register = module.nisa.register_alloc(0)
        return right(bounds, b, size, register)

    return wrong


def forget_the_carried_dq(right: Any, module: ModuleType) -> Any:
    return lambda place, carried, b, h: right(place, (), b, h)


def forget_dq_of_earlier_turns(right: Any, module: ModuleType) -> Any:
    return lambda places, *rest: right({**places, "dq_in": ()}, *rest)


FAULTS = [
    ("loop_fwd", "visible_chunks", turn_once_less, {}),
    ("loop_bwd", "visible_chunks", turn_once_less, {}),
    ("loop_fwd", "visible_chunks", begin_at_the_first_chunk, {"gain": 3000.0}),
    ("loop_fwd", "lowered", never_lower_the_bounds, {"gain": 3000.0}),
    ("loop_fwd", "bounds_of_chunk", load_the_bounds_of_the_first_chunk, {}),
    ("loop_bwd", "bounds_of_chunk", load_the_bounds_of_the_first_chunk, {}),
    ("loop_bwd", "begin_dq", forget_the_carried_dq, {"hops": 2}),
    ("loop_bwd", "key_tile", forget_dq_of_earlier_turns, {}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0]}-{f[2].__name__}")
def test_a_fault_planted_in_a_loop_is_caught(
    fault: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name, plant, changes = fault
    case = KernelCase("gen3", "window", S=300, K=1200, D=32, E=48, loops=True)
    case = replace(case, **changes)
    check(case)
    module = getattr(load("nxd_cp.kernels", generation="gen3"), file)
    monkeypatch.setattr(module, name, plant(getattr(module, name), module))
    with pytest.raises((AssertionError, NkiValidationError)):
        check(case)


def test_loops_and_no_loops_agree() -> None:
    case = KernelCase("gen3", "documents", S=700, K=700, D=32, E=32)
    plain, loops = (by_kernels(replace(case, loops=x), problem(case)) for x in (False, True))
    results = ((*x[:2], *x[2]) for x in (loops, exact(case, problem(case)), plain))
    for other, true, one in zip(*results, strict=True):
        assert_within_budget("loops", other, true, one)


# As a backend of ring_attention.

RINGS = {
    "window": Case(S=256, Hq=2, Hkv=1, D=32, window=60),
    "documents": Case(S=256, Hq=2, Hkv=1, D=32, lengths=(100, 30, 126)),
    "causal": Case(S=256, Hq=2, Hkv=1, D=32),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", RINGS)
def test_a_ring_runs_all_but_static_masks_as_loops_and_is_fp64_attention(
    name: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    case = RINGS[name]
    opcodes: Counter[str] = Counter()

    def on_each_rank(cp: CPContext) -> tuple[torch.Tensor, ...]:
        with record() as log:
            found = one_rank(cp, case, backend="simulate_loops")
        opcodes.update(log.counts())
        return found

    found = join_all(CPContext.local(case.size).run(on_each_rank), case)
    for x, y, z in zip(found, truth(case), one_device(case), strict=True):
        assert_within_budget(name, x, y, z)
    assert ("loop_iteration" in opcodes) == (name != "causal")


def test_an_nki_without_device_loops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old, language = ModuleType("nki"), ModuleType("nki.language")
    old.__version__, old.language = "0.5.0", language
    monkeypatch.setitem(sys.modules, "nki", old)
    monkeypatch.setitem(sys.modules, "nki.language", language)
    with pytest.raises(ValueError, match=r"expected NKI 0\.6 or newer .* got 0\.5\.0; use "):
        kernel_loops.check_language()
    language.fori_loop = print
    kernel_loops.check_language()
