"""The ring on the device: `ring_fwd` and `ring_bwd` in the simulator of many ranks.

Against fp64, against the ring that the host drives, and in the order that the schedule wants.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from cases import NAMES, Case, check_fp32, cut, inputs, join, join_all, one_device, one_rank, truth
from torch import Tensor

from nxd_cp import device_ring
from nxd_cp.attention import ring_attention
from nxd_cp.backends import device_ops, kernel_limits, kernel_modules
from nxd_cp.backends.ring_arguments import backward_arguments, forward_arguments
from nxd_cp.context import CPContext
from nxd_cp.simulators.nki_api import (
    Log,
    NkiSimulatorWarning,
    NkiValidationError,
    load,
    record,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api.memory import HBM, SBUF
from nxd_cp.simulators.nki_api.tensor import NkiTensor
from nxd_cp.transport import RankMismatchError

pytestmark = pytest.mark.filterwarnings("error::nxd_cp.simulators.nki_api.NkiSimulatorWarning")


def run(case: Case, generation: str) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of the whole sequence by the two kernels, one program for all ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
        group = CPContext.local(case.size, layout=case.layout)
        return join_all(group.run(lambda cp: one_rank(cp, case, backend="simulate_ring")), case)


def arguments(case: Case, part: list[Tensor], generation: str) -> tuple[Any, ...]:
    q, k, v, _ = part
    return forward_arguments(
        q,
        k,
        v,
        groups=(tuple(range(case.size)),),
        causal=case.causal,
        scale=case.D**-0.5,
        generation=generation,
    )


def check(case: Case, generation: str) -> None:
    found = run(case, generation)
    for name, x, y, z in zip(NAMES, found, truth(case), one_device(case), strict=True):
        assert_within_budget(name, x, y, z)


def zigzag(size: int, rows: int = 36, **changes: Any) -> Case:
    shape = {"Hq": 2, "Hkv": 1, "D": 32, **changes}
    return Case(layout="zigzag", size=size, causal=True, S=2 * size * rows, **shape)


CASES = [
    *(zigzag(size) for size in (2, 3, 4, 5, 6, 7, 8)),
    zigzag(4, 130, dtype=torch.bfloat16, D=64),
    zigzag(2, 64, B=2, Hq=4, Hkv=2, D=160),
    zigzag(3, 1),
    *(
        Case(layout="contiguous", size=size, causal=False, S=50 * size, Hq=3, Hkv=3, D=32)
        for size in (2, 5, 8)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_device_ring_is_fp64_attention(case: Case) -> None:
    check(case, "gen4" if case.size % 2 else "gen3")


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8])
def test_the_device_ring_equals_the_ring_that_the_host_drives(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = "gen3" if size % 2 else "gen4"
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    case = zigzag(size, 64 if size == 4 else 20)

    group = CPContext.local(case.size, layout="zigzag")
    by_host = join_all(group.run(lambda cp: one_rank(cp, case, backend="simulate")), case)
    for name, x, y, z in zip(NAMES, run(case, generation), truth(case), by_host, strict=True):
        assert_within_budget(name, x, y, z)


def test_groups_of_ranks_are_rings_of_their_own() -> None:
    """Two groups that interleave: every rank gets what its group alone would give it."""
    kernel = load("nxd_cp.kernels", generation="gen3").ring_fwd.ring_fwd
    case = zigzag(2)
    groups = ((0, 2), (1, 3))
    place = {0: (0, 0), 2: (0, 1), 1: (1, 0), 3: (1, 1)}
    calls = []
    for rank in range(4):
        which, index = place[rank]
        q, k, v, _ = (cut(x, case, index) * (1 + which) for x in inputs(case))
        calls.append(forward_arguments(q, k, v, groups=groups, causal=True, scale=0.1))
    results = [o.flatten(2, 3) for o, _ in simulate_ranks(kernel, calls, generation="gen3")]
    for which, members in enumerate(groups):
        q, k, v = (x.double() * (1 + which) for x in inputs(case)[:3])
        options = {"is_causal": True, "scale": 0.1, "enable_gqa": True}
        attend = torch.nn.functional.scaled_dot_product_attention
        found = join([results[rank] for rank in members], case)
        same = attend(q.float(), k.float(), v.float(), **options)
        assert_within_budget("o", found, attend(q, k, v, **options), same)


def opcodes(case: Case, direction: str) -> list[list[str]]:
    """The instructions of every rank."""
    log = program(case, direction)
    return [[r.opcode for r in log.of_core(rank, 0)] for rank in range(case.size)]


def program(case: Case, direction: str, lnc: int = 1) -> Log:
    """The log of one direction."""
    kernels = load("nxd_cp.kernels", generation="gen3")
    parts = [[cut(x, case, rank) for x in inputs(case)] for rank in range(case.size)]
    calls = [arguments(case, part, "gen3") for part in parts]
    kernel = kernels.ring_fwd.ring_fwd
    if direction == "backward":
        kernel = kernels.ring_bwd.ring_bwd
        rows = torch.zeros(case.B, case.Hq, case.S // case.size)
        calls = [backward_arguments(p[3], rows, rows, c) for p, c in zip(parts, calls, strict=True)]
    with record() as log:
        simulate_ranks(kernel, calls, generation="gen3", lnc=lnc)
    return log


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_ranks_run_one_program(direction: str) -> None:
    first, *others = opcodes(zigzag(4), direction)
    assert all(other == first for other in others)


def moves(program: list[str]) -> list[str]:
    """The order of permutes and computation, a run of either written once."""
    kinds = {"collective_permute_implicit": "permute", "nc_matmul": "compute"}
    named = [kinds[opcode] for opcode in program if opcode in kinds]
    runs = [a for a, b in zip(named, [None, *named], strict=False) if a != b or a == "permute"]
    return runs


def test_the_next_keys_are_asked_for_before_the_present_ones_are_used() -> None:
    forward = moves(opcodes(zigzag(4), "forward")[0])
    assert forward == ["permute", "compute"] * 3


def test_gradients_go_on_after_their_step_and_make_the_full_turn() -> None:
    backward = moves(opcodes(zigzag(3), "backward")[0])
    assert backward == [
        *("permute", "compute", "permute"),  # keys out, own step, gradients out
        *("permute", "compute", "permute"),
        *("compute", "permute"),  # no more keys; the gradients come home
    ]


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The memories of tensors whose address a register decided, one entry per access."""
    found: list[int] = []
    right = NkiTensor.ap

    def noted(self: NkiTensor, *pattern: Any, **options: Any) -> NkiTensor:
        if options.get("scalar_offset") is not None or options.get("vector_offset") is not None:
            found.append(self.space)
        return right(self, *pattern, **options)

    monkeypatch.setattr(NkiTensor, "ap", noted)
    return found


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_registers_move_addresses_in_hbm_alone(direction: str, moving: list[int]) -> None:
    """So that only DMAs have them: engines compute in SBUF and PSUM."""
    program(zigzag(3), direction)
    assert set(moving) == {HBM}


def test_an_operand_that_a_register_moves_is_caught(
    moving: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("nxd_cp.kernels", generation="gen3").flash_fwd
    right = module.load_rows

    def wrong(place: Any, b: int, h: int) -> Any:
        rows = right(place, b, h)
        register, row = module.nisa.register_alloc(0), rows.shape[1] * rows.shape[2]
        rows.ap(pattern=[[row, 1], [1, 4]], scalar_offset=register, indirect_dim=2)
        return rows

    monkeypatch.setattr(module, "load_rows", wrong)
    program(zigzag(2), "forward")
    assert set(moving) == {HBM, SBUF}


Plant = Callable[[Any, pytest.MonkeyPatch], None]


def drop_the_permute_of_the_keys(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels.ring_fwd, "send_on", lambda src, dst, group: None)


def take_the_other_side(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    right = kernels.ring_steps.place_of

    def wrong(hbm: Any, index: Any, *rest: Any) -> Any:
        return right(hbm, 0 if index == "x" else index, *rest)

    patch.setattr(kernels.ring_fwd, "place_of", wrong)


def drop_the_permute_of_the_gradients(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    right = kernels.ring_bwd.send_on

    def wrong(src: Any, dst: Any, group: Any) -> None:
        if not src.name.startswith("grads"):
            right(src, dst, group)

    patch.setattr(kernels.ring_bwd, "send_on", wrong)


def send_the_other_buffer(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    right = kernels.ring_fwd.send_on
    patch.setattr(kernels.ring_fwd, "send_on", lambda src, dst, group: right(dst, src, group))


def send_gradients_before_they_are_added(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    """The permutes change places: gradients leave before their step, keys after it."""
    right, late = kernels.ring_bwd.send_on, threading.local()
    make = kernels.ring_bwd.make_buffers

    def remember(*about: Any) -> Any:
        late.buffers = make(*about)
        late.keys, late.step = None, 0
        return late.buffers

    def wrong(src: Any, dst: Any, group: Any) -> None:
        if src.name.startswith("kv"):
            right(late.buffers[late.step % 2], late.buffers[(late.step + 1) % 2], group)
            late.keys, late.step = (src, dst), late.step + 1
        elif late.keys:
            right(*late.keys, group)
            late.keys = None
        else:
            right(src, dst, group)

    patch.setattr(kernels.ring_bwd, "make_buffers", remember)
    patch.setattr(kernels.ring_bwd, "send_on", wrong)


def forget_who_came_first(kernels: Any, patch: pytest.MonkeyPatch) -> None:
    right = kernels.ring_fwd.rectangles

    def wrong(mask: str, step: int) -> Any:
        return tuple((q, k, m, True, True) for q, k, m, _, _ in right(mask, step))

    patch.setattr(kernels.ring_fwd, "rectangles", wrong)


@pytest.mark.parametrize(
    "plant",
    [
        drop_the_permute_of_the_keys,
        drop_the_permute_of_the_gradients,
        send_the_other_buffer,
        take_the_other_side,
        send_gradients_before_they_are_added,
        forget_who_came_first,
    ],
    ids=lambda f: f.__name__,
)
def test_a_fault_planted_in_the_ring_is_caught(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(zigzag(3), "gen3")
    plant(load("nxd_cp.kernels", generation="gen3"), monkeypatch)
    with pytest.raises((AssertionError, NkiValidationError, NkiSimulatorWarning)):
        check(zigzag(3), "gen3")


REFUSED = [
    ({"generation": "gen2"}, {}, "expected gen3 .trn2. or later, got gen2"),
    ({"groups": ((0, 1), (2,))}, {}, r"groups of one length, got \[1, 2\]"),
    ({}, {"rows": 9}, "even number of rows .two zigzag chunks., got 9"),
    ({}, {"keys": 12}, "as many keys as queries on a rank, got 12 and 8"),
    ({}, {"rows": 16384, "keys": 16384}, "bytes of SBUF per partition, got"),
    ({}, {"heads": 400}, "instructions in one program, got about"),
]


@pytest.mark.parametrize(("options", "shape", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_limits_of_the_device_ring(
    options: dict[str, Any], shape: dict[str, int], message: str
) -> None:
    rows, heads = shape.get("rows", 8), shape.get("heads", 1)
    q = torch.zeros(1, heads, rows, 64)
    k = torch.zeros(1, heads, shape.get("keys", rows), 64)
    given = {"groups": ((0, 1),), "causal": True, "scale": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        forward_arguments(q, k, k, **given)


def refused(
    message: str,
    *,
    layout: str = "zigzag",
    strategy: str = "ring",
    shape: tuple[int, ...] = (1, 2, 8, 16),
    **options: Any,
) -> None:
    """Two ranks whose call raises on both, before keys or values are sent."""

    def on_each_rank(cp: CPContext) -> int:
        q, k, v = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        with pytest.raises(ValueError, match=message):
            ring_attention(q, k, v, cp=cp, **{"backend": "simulate_ring", **options})
        return cp.transport.counters.messages["gather"]

    group = CPContext.local(2, layout=layout, strategy=strategy)
    assert group.run(on_each_rank) == [0, 0]


NOT_IN_THE_KERNELS = [
    ({"window": 4}, "expected no window, got one"),
    ({"segment_ids": torch.zeros(1, 8).int()}, "expected no segment_ids, got one"),
    ({"cu_seqlens": torch.tensor([0, 5, 16])}, "expected no cu_seqlens, got one"),
    ({"sinks": torch.zeros(2)}, "expected no sinks, got one"),
    ({"seq_len": 15}, "expected no padding, got seq_len=15 in 16 slots"),
    ({"dropout_p": 0.1}, "no generator gives equal masks"),
    ({"strategy": "heads"}, 'expected a context with strategy="ring", got "heads"'),
    ({"layout": "striped"}, 'expected layout="zigzag" where causal, got "striped"'),
    ({"shape": (1, 2, 7, 16)}, "expected a multiple of 2 .chunks per rank, .*, got 7"),
    ({"backend": "nki_ring"}, "AWS Neuron SDK"),
]


@pytest.mark.parametrize(("options", "message"), NOT_IN_THE_KERNELS, ids=lambda x: str(x)[:30])
def test_what_the_ring_kernels_do_not_know_is_refused(
    options: dict[str, Any], message: str
) -> None:
    refused(message, **options)


def test_the_device_ring_needs_gen3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")
    refused("expected gen3 .trn2. or later, got gen2")


def test_the_device_ring_needs_a_context_of_equal_parts() -> None:
    x = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match='cp=None; a single device needs no ring, use backend="si'):
        ring_attention(x, x, x, backend="simulate_ring")

    def on_each_rank(cp: CPContext) -> str:
        x = torch.zeros(1, 1, 8 + 2 * cp.rank, 16)
        with pytest.raises(RankMismatchError) as caught:
            ring_attention(x, x, x, cp=cp, backend="simulate_ring")
        return str(caught.value)

    for said in CPContext.local(2).run(on_each_rank):
        assert "q = (1, 1, 8, 16) on rank 0, (1, 1, 10, 16) on rank 1" in said


@pytest.fixture
def kernels_under_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend "nki" with the simulator's kernels under its ops, on CPU tensors."""
    kernels = load("nxd_cp.kernels", generation="gen3")
    right = importlib.import_module

    def find(name: str) -> Any:
        folder, _, file = name.rpartition(".")
        return getattr(kernels, file) if folder == "nxd_cp.kernels" else right(name)

    monkeypatch.setattr(kernel_modules, "has_nki", lambda: True)
    monkeypatch.setattr(kernel_modules, "importlib", SimpleNamespace(import_module=find))
    monkeypatch.setattr(device_ops, "_OPS", {})
    monkeypatch.setattr(device_ops, "STACKS", {"cpu": "xla"})
    monkeypatch.setattr(device_ring, "cores_of", lambda kernels: 1)
    monkeypatch.setattr(device_ops, "launch_cores", lambda: 1)


def test_on_a_device_every_rank_launches_its_own_program(
    kernels_under_ops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring of one, with stand-ins: never run on a device."""
    monkeypatch.setattr(device_ring._Ring, "_check_job", lambda self: None)
    case = zigzag(1)
    group = CPContext.local(1)
    found = join_all(group.run(lambda cp: one_rank(cp, case, backend="nki_ring")), case)
    assert {name for name, _ in device_ops._OPS} == {"ring_fwd", "ring_bwd", "row_delta"}
    check_fp32(case, found)


def test_a_device_ring_is_the_whole_job_and_two_cores_share_its_heads(
    kernels_under_ops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("a context of all 1 processes of the job, got CPContext", backend="nki_ring")
    monkeypatch.setattr(device_ring, "cores_of", lambda kernels: 2)
    refused("heads that the 2 cores of a rank can share, got 3; use one core", shape=(1, 3, 8, 16))


@pytest.mark.parametrize(
    ("size", "shape"),
    [(2, {"B": 2, "Hq": 2, "Hkv": 1}), (3, {"Hq": 4, "Hkv": 2}), (4, {"Hq": 2, "Hkv": 2})],
    ids=str,
)
def test_two_cores_of_a_rank_share_its_heads_and_give_the_same_bits(
    size: int, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zigzag(size, 20, **shape)
    alone = run(case, "gen3")
    monkeypatch.setattr(device_ring, "cores_of", lambda kernels: 2)
    for x, y in zip(run(case, "gen3"), alone, strict=True):
        assert torch.equal(x, y)
    if size == 2:
        check(case, "gen4")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_of_two_cores_sends_its_own_heads(direction: str) -> None:
    case = zigzag(3, Hq=4, Hkv=2)
    sent = {}
    for lnc in (1, 2):
        log = program(case, direction, lnc)
        for core in range(lnc):
            own = [one.bytes_sent for one in log.of_core(0, core).exchanges]
            sent[lnc, core] = own
    assert sent[2, 0] == sent[2, 1]
    assert [2 * half for half in sent[2, 0]] == sent[1, 0]
    assert len(sent[1, 0]) == (2 if direction == "forward" else 5)


def test_the_instructions_of_a_ring_are_within_the_estimate() -> None:
    case = zigzag(2, 128)
    program = opcodes(case, "backward")[0]
    launch = kernel_limits.Launch(2, 128, 128, 32, 32, 4)
    estimate = 5 * kernel_limits.backward_instructions(launch)
    assert len(program) <= estimate
