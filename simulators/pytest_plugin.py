"""pytest plugin `nki-simulator`: test your own NKI kernels on the simulator.

With `nki_simulator = true` in the ini file (or --nki-simulator), `import nki` in tests is the
simulator, for the generations of `nki_generations` and with the checks that the options choose.
Without it, nothing changes but that the fixture `nki_simulator` exists, and nothing of the
simulator is imported before it is used. Refuses to hide a real nki. Does not time anything.

Source of the hooks: pytest's plugin reference.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of the ini file; the command line wins."""
    group = parser.getgroup("nki", "NKI simulator")
    group.addoption("--nki-simulator", action="store_true", help="import nki is the simulator")
    group.addoption(
        "--nki-generation", action="append", default=[], metavar="CHIP", help="gen2, trn2, ..."
    )
    group.addoption("--nki-strict", action="store_true", help="rules of the inferred tier raise")
    group.addoption("--nki-shape-only", action="store_true", help="check, compute no values")
    group.addoption(
        "--nki-adversarial", type=int, metavar="SEED", help="the worst legal order of cores"
    )
    parser.addini("nki_simulator", "import nki is the simulator", type="bool", default=False)
    parser.addini("nki_generations", "generations to test for", type="args", default=[])
    parser.addini("nki_strict", "rules of the inferred tier raise", type="bool", default=False)


def _enabled(config: pytest.Config) -> bool:
    return bool(config.getoption("nki_simulator") or config.getini("nki_simulator"))


def _generations(config: pytest.Config) -> list[str]:
    from nxd_cp.simulators.nki_api import chips

    given = config.getoption("nki_generation") or config.getini("nki_generations") or [None]
    try:
        return list(dict.fromkeys(chips.generation_name(name) for name in given))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _params(config: pytest.Config) -> Any:
    from nxd_cp.simulators.nki_api import SimParams

    return SimParams(
        strict=config.getoption("nki_strict") or config.getini("nki_strict"),
        values=not config.getoption("nki_shape_only"),
        adversarial=config.getoption("nki_adversarial"),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the simulator under `nki`, if asked to."""
    config.addinivalue_line(
        "markers", "nki_generations(name, ...): the generations that this test is for"
    )
    if _enabled(config):
        try:
            from nxd_cp.simulators.nki_api import install
        except ImportError as error:
            text = f"the NKI simulator needs numpy and ml_dtypes ({error}); install nxd-cp[sim]"
            raise pytest.UsageError(text) from error
        _generations(config)
        before = set(sys.modules)
        try:
            install()
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from error
        ours = [m for m in set(sys.modules) - before if m == "nki" or m.startswith("nki.")]
        config.add_cleanup(functools.partial(_forget, ours))


def _forget(names: list[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


def pytest_report_header(config: pytest.Config) -> str | None:
    """What `import nki` is in this run."""
    if not _enabled(config):
        return None
    checks = "strict" if _params(config).strict else "default checks"
    return f"nki: simulated, not timed ({', '.join(_generations(config))}; {checks})"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per generation for tests that use the fixture."""
    if "nki_simulator" in metafunc.fixturenames:
        from nxd_cp.simulators.nki_api import chips

        wanted = _generations(metafunc.config)
        for mark in metafunc.definition.iter_markers("nki_generations"):
            allowed = {chips.generation_name(name) for name in mark.args}
            wanted = [name for name in wanted if name in allowed]
        metafunc.parametrize("_nki_generation", wanted, indirect=True)


@pytest.fixture
def _nki_generation(request: pytest.FixtureRequest) -> str:
    """The generation of this test."""
    return str(request.param)


@pytest.fixture
def nki_simulator(request: pytest.FixtureRequest, _nki_generation: str) -> Any:
    """A testing.Simulator for one generation; the test is repeated for each one chosen."""
    from nxd_cp.simulators.nki_api.testing import Simulator

    return Simulator(_nki_generation, _params(request.config))


@pytest.fixture(autouse=True)
def _nki_defaults(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Kernels that a test calls itself see the options, too."""
    if not _enabled(request.config):
        yield
        return
    from nxd_cp.simulators.nki_api import parameters

    if not os.environ.get(VARIABLE) or request.config.getoption("nki_generation"):
        monkeypatch.setenv(VARIABLE, _generations(request.config)[0])
    with parameters(_params(request.config)):
        yield
