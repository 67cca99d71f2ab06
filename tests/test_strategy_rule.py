"""The rule between the strategies, and `nxd-cp plan`, which prints what it says."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.schedule import make_plan
from nxd_cp.strategies import Strategy, cost
from nxd_cp.strategies.cost import FIGURES, Shape, candidates, choose, compare, estimate
from nxd_cp.strategies.plan import LEAST_ROUND_BYTES


def chosen(seq_len: int, size: int = 8, shape: Shape | None = None) -> Strategy:
    plan = make_plan("zigzag", size, seq_len)
    return choose(plan, Strategy("auto"), shape or Shape(1, 32, 8, 128, 2))


def test_the_rule_takes_the_ring_where_it_hides_and_another_where_it_cannot() -> None:
    assert chosen(2**20).name == "ring"
    assert chosen(2**12).name != "ring"


def test_the_rule_never_takes_heads_that_do_not_divide() -> None:
    for size, num_kv_heads in product((2, 4, 8), (1, 2, 3, 8)):
        shape = Shape(1, 8 * num_kv_heads, num_kv_heads, 64, 2)
        for one in compare(make_plan("zigzag", size, 64 * size), shape, "trn1"):
            ways = one.work.ways
            assert size % ways == 0
            assert num_kv_heads % ways == 0


def test_with_free_links_all_strategies_cost_the_computation_and_the_ring_is_taken() -> None:
    free = dataclasses.replace(FIGURES["trn2"], gb_per_s=1e12, latency_us=0.0)
    shape = Shape(1, 8, 4, 64, 2)
    plan = make_plan("contiguous", 4, 4096, causal=False)
    ideal = 3.5 * 4 * 64 * 8 * 4096 * 1024 / (free.tflops * free.efficiency * 1e12)
    for work in candidates(plan, shape):
        assert estimate(work, shape, free).seconds == pytest.approx(ideal, rel=1e-6)
    long = make_plan("contiguous", 4, 2**20, causal=False)
    assert compare(long, shape, "trn2")[0].work.strategy.name == "ring"


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ValueError, match="chip: expected one of trn1, trn2, trn3, got 'trn9'"):
        compare(make_plan("zigzag", 2, 64), Shape(1, 2, 2, 16, 2), "trn9")


@pytest.mark.parametrize(
    ("local_len", "heads", "kv_heads", "rounds"),
    [
        (1024, 8, 8, 1),  # 1 MiB per head: eight make a round
        (2048, 8, 8, 2),
        (2048, 8, 2, 2),  # four query heads read each: one makes a round
        (2048, 6, 3, 2),
        (8192, 8, 8, 4),  # query heads do not pair up, so heads go by two
        (8192, 3, 3, 3),
        (64, 8, 8, 1),
        (8192, 8, 1, 1),
    ],
)
def test_a_ring_runs_in_rounds_that_stay_large(
    local_len: int, heads: int, kv_heads: int, rounds: int
) -> None:
    plan = make_plan("zigzag", 2, 2 * local_len)
    shape = Shape(1, heads, kv_heads, 128, 4)
    work = cost.plan_for(plan, Strategy("ring"), shape)
    assert len(work.rounds) == rounds
    assert [h for one in work.rounds for h in range(kv_heads)[one]] == list(range(kv_heads))
    if rounds > 1:
        kept = work.rounds[0].stop * (heads // kv_heads) * plan.longest_hop * shape.row_bytes
        assert kept >= LEAST_ROUND_BYTES
    asked = cost.plan_for(plan, Strategy("ring", heads_per_round=kv_heads), shape)
    assert len(asked.rounds) == 1, "the caller's number is taken"


def test_a_window_makes_messages_of_its_halo_and_as_many_rounds() -> None:
    plan = make_plan("contiguous", 4, 2**16, window=4097)
    assert plan.longest_hop == 4096
    assert len(cost.plan_for(plan, Strategy("ring"), Shape(1, 8, 8, 128, 4)).rounds) == 4
    assert len(cost.plan_for(plan, Strategy("ring"), Shape(1, 8, 8, 128, 2)).rounds) == 2


def planned(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_plan_command_prints_costs_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "made" / "plan.png"
    result = planned("--ranks", "4", "--seq-len", "4096", "--png", str(picture))
    assert result.exit_code == 0, result.output
    assert "taken: " in result.output
    assert "by the rule" in result.output
    for name in ("ring", "gather", "heads x2", "heads x4"):
        assert f"\n{name} " in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plan_command_shows_the_steps_of_what_was_asked_for() -> None:
    result = planned("--ranks", "4", "--seq-len", "64", "--strategy", "heads")
    assert "taken: heads x4, asked for" in result.output
    assert "causal" in result.output.splitlines()[2]
    assert "zigzag, 4 ranks, 61 tokens (16 per rank), causal" in planned("--seq-len", "61").output
    refused = planned("--ranks", "4", "--heads", "9", "--kv-heads", "3", "--strategy", "heads")
    assert refused.exit_code == 2
    assert "expected one of gather, ring" in " ".join(refused.output.split())


def test_message_bytes_of_the_rule_are_those_of_the_plans() -> None:
    """The largest messages times their number are at least, and near, what is sent in all."""
    shape = Shape(1, 8, 4, 64, 2)
    for one in compare(make_plan("zigzag", 4, 4096, causal=False), shape, "trn2"):
        kv, grad, exchanged = one.hop_bytes
        traffic = one.work.traffic(0, **vars(shape))
        rounds, ways = len(one.work.rounds), one.work.ways
        sent = rounds * (2 * kv + grad) * (4 // ways - 1)
        if one.work.strategy.name == "ring":
            sent += grad  # gradients make the full turn
        extra = (traffic.forward_bytes + traffic.backward_bytes) - sent
        assert extra >= 0
        assert extra <= 3 * exchanged * (ways - 1) + grad + 64 * one.num_messages
