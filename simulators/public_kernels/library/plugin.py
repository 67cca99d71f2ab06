"""The pytest plugin of the child process that runs nki-library's tests.

    python -m pytest -p nxd_cp.simulators.public_kernels.library.plugin CLONE/test/... \\
        --test-mode simulation --rows-kernel NAME --rows-file FILE

Loaded before the clone's conftest: provides the modules, then picks rows, limits their time and
writes every outcome to a file as it comes. Does not judge: the clone's own validator does.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nxd_cp.simulators.nki_api import NkiValidationError, SimParams, parameters
from nxd_cp.simulators.nki_api.chips import TARGET_VARIABLE
from nxd_cp.simulators.public_kernels import clock, outcomes
from nxd_cp.simulators.public_kernels.library import modules, repair, spread, standins

sys.dont_write_bytecode = True  # the clone stays as it is
standins.install()
modules.provide()
repair.install("nkilib_src")
_RULE = re.compile(r"rule (\S+) \(")
_NEWER = ("instruction.generation", "operand.op_generation", "tensor_scalar.op")  # rules of chips


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the child process."""
    group = parser.getgroup("public kernels")
    group.addoption("--rows-kernel", default="", help="name of the kernel in the table")
    group.addoption("--rows-file", type=Path, default=None, help="JSON lines of outcomes")
    group.addoption("--rows", type=int, default=0, help="at most this many rows, spread; 0: all")
    group.addoption("--row-seconds", type=float, default=0, help="limit per row; 0: none")
    group.addoption("--rows-seconds", type=float, default=0, help="limit of all rows; 0: none")
    group.addoption("--row-gigabytes", type=float, default=0, help="limit per row; 0: none")
    group.addoption("--rows-tolerate", default="", help="ids of rules that only warn, with commas")
    group.addoption("--rows-seed", default="", help="draw the rows with this seed")
    group.addoption("--rows-go-on", action="store_true", help="failed rows are not run again")


class Rows:
    """Which rows run, for how long, and what came of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.kernel: str = config.getoption("rows_kernel")
        self.file: Path = config.getoption("rows_file")
        self.limit: int = config.getoption("rows")
        self.seed: str = config.getoption("rows_seed")
        self.row_seconds: float = config.getoption("row_seconds")
        self.seconds: float = config.getoption("rows_seconds")
        self.gigabytes: float = config.getoption("row_gigabytes")
        clock.limit_memory(self.gigabytes)
        known = [o for o in outcomes.read(self.file).values() if o.kernel == self.kernel]
        if not config.getoption("rows_go_on"):
            known = [o for o in known if o.status != outcomes.FAILED]
        self.done = {o.row for o in known}
        self.ran = sum(o.status != outcomes.SKIPPED for o in known)
        self.started: float | None = None
        tolerated = config.getoption("rows_tolerate")
        self.params = SimParams(tolerate=tuple(filter(None, tolerated.split(","))))
        self.warned = ""  # what the simulator said of the row that has just run

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Spread or draw the rows; leave out those that are done."""
        outcomes.collect(self.file, self.kernel, len(items))
        if self.seed:
            items[:] = spread.sample(items, f"{self.seed} {self.kernel}")
        elif self.limit:
            items[:] = spread.spread(items, self.limit)
        items[:] = [item for item in items if spread.row_name(item) not in self.done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Say nothing of the rows that the spread no longer needs or has time for."""
        if self.limit and self.ran >= self.limit:
            return True
        now = time.process_time()
        self.started = now if self.started is None else self.started
        return True if self.seconds and now - self.started > self.seconds else None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """Stop a row that takes too long; remember what the simulator warned of."""
        with warnings.catch_warnings(record=True) as seen, parameters(self.params):
            warnings.simplefilter("default")
            with clock.limit(self.row_seconds):
                yield
        self.warned = telling(str(w.message) for w in seen)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        """Write one outcome per row."""
        result: Any = yield
        report = result.get_result()
        if report.when == "call" or (report.when == "setup" and not report.passed):
            error = call.excinfo.value if call.excinfo is not None else None
            too_large = clock.too_much(_causes(error), self.gigabytes)
            status, reason = (outcomes.SKIPPED, too_large) if too_large else _judge(report, error)
            if status == outcomes.FAILED and self.warned:
                reason = f"{reason}; the simulator warned: {self.warned}"
            self.ran += status != outcomes.SKIPPED
            name = spread.row_name(item)
            row = outcomes.Outcome(self.kernel, name, status, reason, round(call.duration, 2))
            outcomes.append(self.file, row)
            if too_large:
                # Threads of the row may still compute: go on in a fresh process.
                os._exit(outcomes.GO_ON)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that does not import is a failed row of its own."""
        if report.failed:
            reason = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
            row = outcomes.Outcome(self.kernel, report.nodeid, outcomes.FAILED, reason)
            outcomes.append(self.file, row)


def telling(messages: Iterable[str]) -> str:
    """Rule and line of warnings that can explain wrong values: of memory and races."""
    found: dict[str, str] = {}
    for message in messages:
        rule = _RULE.search(message)
        if rule is not None and rule[1].startswith(("memory.", "race.")):
            found.setdefault(rule[1], message.strip().splitlines()[-1].strip())
    return "; ".join(f"{rule} {line}" for rule, line in found.items())


def needs_newer_chip(error: BaseException | None) -> bool:
    """Whether a kernel uses what its chip is documented not to have: not a failure of either."""
    rule = _RULE.search(str(error)) if isinstance(error, NkiValidationError) else None
    return rule is not None and rule[1] in _NEWER


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _judge(report: Any, error: BaseException | None) -> tuple[str, str]:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return outcomes.SKIPPED, reason.removeprefix("Skipped: ")
    if report.passed:
        return outcomes.PASSED, ""
    chain = list(_causes(error))
    first = chain[-1] if chain else None
    if needs_newer_chip(first):
        return outcomes.SKIPPED, f"not for this chip: {str(first).splitlines()[0]}"
    return outcomes.FAILED, f"{type(first).__name__}: {first}" if first is not None else "failed"


def pytest_configure(config: pytest.Config) -> None:
    """Simulate the platform that is tested; watch the rows, if a file for them is given."""
    os.environ.setdefault(TARGET_VARIABLE, config.getoption("platform_target"))
    if config.getoption("rows_file") is not None:
        config.pluginmanager.register(Rows(config), "public-kernel-rows")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the published files that had to be repaired to be imported."""
    for line in repair.REPAIRS:
        terminalreporter.write_line(f"repaired in memory: {line}")


def pytest_collection_finish() -> None:
    """Teach the clone's driver about ranks."""
    from nxd_cp.simulators.public_kernels.library import ranks

    driver = sys.modules.get("test.utils.test_orchestrator")
    if driver is not None:
        ranks.patch(driver)
