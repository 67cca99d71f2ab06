"""Blocks that the generated cases seldom or never draw: nothing visible, lone tokens, odd heads.

Each against fp64 within the budget of kernel_cases.py, on one generation, or on all where that is
cheap; masks of intervals also by loops on the device.
Letters: B batch; S query rows, K keys; Hq and Hkv query and key/value heads; D, E head dims.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import KernelCase, Problem, check, problem

from nxd_cp.backends import kernel_masks
from nxd_cp.backends.base import BlockMask, Documents
from nxd_cp.reference import hidden
from nxd_cp.schedule import Bounded, Mask

GENERATIONS = ("gen2", "gen3", "gen4")
EVERYTHING, NOTHING = Bounded(-10_000, 10_000), Bounded(10_000, 10_001)


def in_pieces(case: KernelCase, *pieces: tuple[slice, BlockMask]) -> Problem:
    """The case's tensors under these masks; each piece is a hop."""
    x = problem(replace(case, mask="full", hops=1))
    seen = torch.zeros(case.B, 1, case.S, case.K, dtype=torch.bool)
    for keys, mask in pieces:
        inner: Mask = mask.mask if isinstance(mask, Documents) else mask
        part = ~hidden(inner, case.S, keys.stop - keys.start, x.q.device)
        if isinstance(mask, Documents):
            part = part & (mask.q_ids[:, None, :, None] == mask.k_ids[:, None, None, :])
        seen[..., keys] = part
    return replace(x, seen=seen, pieces=pieces)


HOPS = {
    "first": (NOTHING, EVERYTHING, Bounded(-1000, 50)),
    "middle": (EVERYTHING, NOTHING, EVERYTHING),
    "last": (EVERYTHING, Bounded(-1000, 50), NOTHING),
    "all": (NOTHING, NOTHING, NOTHING),
    "of some rows": (Bounded(-1000, -60), NOTHING, Bounded(-1000, -120)),
}


@pytest.mark.parametrize("launched", [False, True], ids=["skipped", "launched"])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("name", HOPS)
def test_hops_in_which_nothing_is_visible_change_nothing(
    name: str, sink: bool, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launched: as on a device, where the host does not read bounds to skip a launch."""
    if launched:
        monkeypatch.setattr(kernel_masks.Bounds, "is_empty", lambda *place: False)
    cuts = slice(0, 100), slice(100, 230), slice(230, 300)
    for i, generation in enumerate(GENERATIONS):
        case = KernelCase(generation, S=260, K=300, D=32, E=32, sink=sink, loops=i % 2 == 0)
        check(case, in_pieces(case, *zip(cuts, HOPS[name], strict=True)))


BANDS = [Bounded(-500, -400), Bounded(-310, -290), Bounded(-50, -40), Bounded(290, 310)]


@pytest.mark.parametrize("loops", [False, True], ids=["", "loops"])
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_windows_that_end_before_the_first_key_or_begin_after_the_last(
    band: Bounded, generation: str, loops: bool
) -> None:
    case = KernelCase(generation, S=300, K=300, Hq=3, D=16, E=32, loops=loops)
    check(case, in_pieces(case, (slice(0, 300), band)))


@pytest.mark.parametrize("loops", [False, True], ids=["", "loops"])
@pytest.mark.parametrize(
    ("generation", "mask"), [("gen2", "causal"), ("gen3", "full"), ("gen4", "strict")]
)
@pytest.mark.parametrize("lengths", [[1] * 5 + [200] + [1] * 7, [128, 1, 127, 1, 2], [1] * 130])
def test_documents_of_one_token_among_long_ones(
    lengths: list[int], generation: str, mask: Mask, loops: bool
) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    case = KernelCase(generation, S=len(ids[0]), K=len(ids[0]), D=16, E=16, loops=loops)
    check(case, in_pieces(case, (slice(0, case.K), Documents(mask, ids, ids))))


CASES = [
    KernelCase("gen2", "causal", torch.bfloat16, S=150, K=150, Hq=7, D=256, E=16),
    KernelCase("gen3", "strict", torch.float32, S=150, K=150, Hq=16, D=16, E=256),
    KernelCase("gen3", "window", torch.float16, S=150, K=300, Hq=14, Hkv=2, D=17, E=255),
    KernelCase("gen2", "offset", torch.float32, S=300, K=130, Hq=7, D=129, E=31, sink=True),
    KernelCase("gen3", "offset", torch.bfloat16, S=100, K=513, Hq=16, D=64, E=16, hops=3),
    KernelCase("gen3", "causal", torch.bfloat16, B=3, S=150, K=150, D=32, E=48, cores=2),
    KernelCase("gen4", "window", B=3, S=150, K=150, Hq=4, D=32, E=48, cores=2, hops=3, sink=True),
    KernelCase("gen3", "documents", B=3, S=150, K=150, Hq=6, Hkv=3, D=32, cores=2, hops=2),
    KernelCase("gen4", "offset", B=1, S=200, K=300, Hq=16, D=32, cores=2, hops=2, loops=True),
    KernelCase("gen2", "causal", S=1, K=1, D=16, E=16, sink=True, gain=8000.0),
    KernelCase("gen3", "strict", S=1, K=1, D=16, E=16, sink=True),
    KernelCase("gen4", "documents", torch.float16, S=1, K=1, D=16, E=16, sink=True, loops=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_heads_and_head_dims_on_one_and_two_cores(case: KernelCase) -> None:
    check(case)


@pytest.mark.parametrize("sink", [3e4, -3e4, -torch.inf])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_sinks_far_from_all_scores(generation: str, sink: float) -> None:
    """One that takes all the weight, and two that take none; the first row sees no key."""
    case = KernelCase(generation, "strict", S=150, K=150, D=32, E=32, gain=100.0, sink=True)
    check(case, replace(problem(case), sink=torch.full((case.Hq,), sink)))
