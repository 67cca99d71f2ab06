"""A kernel that runs on without an instruction ends with an error at its line, never a hang."""

import itertools
import threading
import time
import warnings

import numpy as np
import pytest
from nki_sim import load, nl, normal, store

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
    simulate_ranks,
    watchdog,
)
from nxd_cp.simulators.nki_api import collectives as ncc
from nxd_cp.simulators.nki_api import isa as nisa

pytestmark = pytest.mark.filterwarnings("ignore::nxd_cp.simulators.nki_api.NkiSimulatorWarning")
LIMIT = SimParams(stall_seconds=0.2)
X = normal(128, 8)


def endless(x):
    load(x)
    while True:
        pass  # bad


def asleep(x):
    load(x)
    while True:
        time.sleep(0.01)  # bad


def stubborn(x):
    for _ in range(3):
        try:
            while True:
                x = x[0:128]
        except BaseException:
            continue
    while True:
        pass  # bad


def lineless(x):
    load(x)
    for step in itertools.repeat(1):  # bad; the jump back, where the loop is ended, has no line
        load(x) if not step else None  # bad


def busy(x):
    """Slow, but it works: an instruction now and then."""
    tile, end = load(x), time.thread_time() + 3 * LIMIT.stall_seconds
    while time.thread_time() < end:
        for _ in range(1000):
            pass
        nisa.tensor_copy(tile, tile)
    return store(tile)


def ends(call):
    """The call is ended in time by the rule, at the line marked as bad."""
    with parameters(LIMIT), pytest.raises(NkiValidationError) as caught:
        call()
    text = str(caught.value)
    assert "rule kernel.endless " in text
    last = text.splitlines()[-1]
    assert "# bad" in last or "while True" in last, text
    assert "test_nki_watchdog.py" in last
    pytest.ExceptionInfo.from_exception(caught.value).getrepr()  # prints as every error does
    return text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kernel", [endless, stubborn, lineless])
def test_an_endless_loop_is_caught(kernel):
    ends(lambda: Kernel(kernel, "gen3")(X))


@pytest.mark.timeout(120)
def test_a_loop_that_sleeps_is_caught(monkeypatch):
    monkeypatch.setattr(watchdog, "WALL_FACTOR", 1)
    ends(lambda: Kernel(asleep, "gen3")(X))


@pytest.mark.timeout(120)
def test_a_rank_that_loops_while_others_wait_is_caught():
    group = ncc.ReplicaGroup([[0, 1]])

    def kernel(x):
        rank = x.shape[1] - 8
        if rank == 1:
            while True:
                pass  # bad
        src, dst = (nl.ndarray((128, 8), nl.float32, buffer=nl.shared_hbm, name=n) for n in "ab")
        nisa.dma_copy(src, x)
        ncc.all_reduce([src], [dst], group, nl.add)
        return store(load(dst))

    text = ends(lambda: simulate_ranks(kernel, [(X,), (normal(128, 9),)]))
    assert "at rank 1 core 0: " in text


@pytest.mark.timeout(120)
def test_a_slow_kernel_and_a_debuggers_prompt_are_left_alone(monkeypatch):
    with parameters(LIMIT):
        np.testing.assert_array_equal(Kernel(busy, "gen3")(X), X)
    patient = SimParams(stall_seconds=1.0)
    prompt = {"__name__": "pdb", "time": time, "seconds": 2.5 * patient.stall_seconds}
    exec("def interaction():\n    time.sleep(seconds)\n", prompt)

    def kernel(x):
        prompt["interaction"]()
        return store(load(x))

    monkeypatch.setattr(watchdog, "WALL_FACTOR", 1)
    with parameters(patient):
        np.testing.assert_array_equal(Kernel(kernel, "gen3")(X), X)


@pytest.mark.timeout(120)
def test_other_threads_run_on_and_so_does_this_one():
    results = []

    def other():
        with parameters(LIMIT):
            results.append(Kernel(busy, "gen3")(X))

    thread = threading.Thread(target=other)
    thread.start()
    ends(lambda: Kernel(endless, "gen3")(X))
    thread.join()
    np.testing.assert_array_equal(results[0], X)
    with parameters(LIMIT):
        np.testing.assert_array_equal(Kernel(busy, "gen3")(X), X)


def test_no_limit_needs_no_watch(monkeypatch):
    monkeypatch.setattr(watchdog._Watchdog, "add", lambda *_: pytest.fail("watched"))
    with parameters(SimParams(stall_seconds=None)):
        Kernel(lambda x: store(load(x)), "gen3")(X)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_that_is_none_is_rejected(seconds):
    with pytest.raises(ValueError, match="stall_seconds above 0"):
        SimParams(stall_seconds=seconds)


def test_the_watchdog_of_a_forked_child_works_without_its_parents_thread():
    with parameters(LIMIT):
        Kernel(busy, "gen3")(X)
    before = watchdog._WATCHDOG
    watchdog._after_fork()
    assert watchdog._WATCHDOG is not before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NkiSimulatorWarning)
        ends(lambda: Kernel(endless, "gen3")(X))
