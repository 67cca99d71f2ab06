"""Settings of all tests: seeds, one thread, NaN in fresh memory, one long-lived group of ranks.

Generated examples are the same in every run; `--hypothesis-profile random` draws others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import GROUP_TIMEOUT_S, RankGroup

settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretrained", help="folder of a pretrained model, for test_pretrained.py")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Seed, one thread, and `torch.empty` filled with NaN so that unwritten memory shows."""
    torch.manual_seed(1234)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def _rank_groups() -> Iterator[list[RankGroup]]:
    groups: list[RankGroup] = []
    yield groups
    for group in groups:
        group.close()


@pytest.fixture
def ranks(_rank_groups: list[RankGroup]) -> RankGroup:
    """Four gloo ranks that live as long as the session; made again if a test broke them."""
    if not _rank_groups or _rank_groups[-1].closed:
        _rank_groups.append(RankGroup(4))
    return _rank_groups[-1]


@pytest.fixture
def own_ranks() -> Iterator[RankGroup]:
    """Three ranks for one test, with a short group timeout; they may be broken."""
    group = RankGroup(3, group_timeout_s=GROUP_TIMEOUT_S)
    yield group
    group.close()
