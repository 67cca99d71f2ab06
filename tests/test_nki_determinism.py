"""A run gives the same words and bits each time, also when other threads simulate at once."""

import threading

import numpy as np
import pytest
import torch
from nki_sim import load, nisa, nl, normal, own_rows, sbuf, store

from nxd_cp.simulators.nki_api import (
    Kernel,
    NkiDeadlockError,
    NkiSimulatorWarning,
    NkiValidationError,
    SimParams,
    parameters,
    simulate_ranks,
)
from nxd_cp.simulators.nki_api import collectives as ncc
from nxd_cp.simulators.nki_api.runtime import current

X = np.round(8 * normal(128, 8))
ALL = ncc.ReplicaGroup([[0, 1, 2]])
SEEDS = [None, 0, 7]


def reduced(x):
    src, dst = (nl.ndarray((128, 8), nl.float32, nl.shared_hbm, name=n) for n in ("s", "d"))
    nisa.dma_copy(src, x)
    ncc.all_reduce([src], [dst], ALL, nl.add)
    return store(load(dst))


def stuck(x):
    """Rank 2 meets rank 0 alone, which waits for all."""
    odd = current("here").place.rank == 2
    src, dst = (nl.ndarray((128, 8), nl.float32, nl.shared_hbm, name=n) for n in ("s", "d"))
    nisa.dma_copy(src, x)
    group = ncc.ReplicaGroup([[0, 2], [1]]) if odd else ALL
    ncc.all_reduce([src], [dst], group, nl.add)


def unequal(x):
    odd = current("here").place.rank == 1
    src, dst = (nl.ndarray((128, 8), nl.float32, nl.shared_hbm, name=n) for n in ("s", "d"))
    nisa.dma_copy(src, x)
    ncc.all_reduce([src], [dst], ALL, nl.maximum if odd else nl.add)


def racing(x):
    data = nl.ndarray((128, 8), nl.float32, nl.shared_hbm, name="data")
    nisa.dma_copy(data[own_rows(128)], load(x[own_rows(128)]))
    nisa.dma_copy(sbuf((128, 8)), data)


def message(kernel, seed):
    """What a run of three ranks (a race: of two cores) says."""
    with parameters(SimParams(strict=True, adversarial=seed)):
        try:
            if kernel is racing:
                Kernel(kernel, "gen3")[2](X)
            else:
                simulate_ranks(kernel, [(X,)] * 3, generation="gen3")
        except NkiValidationError as error:
            return type(error), str(error)
    return None


@pytest.fixture(autouse=True)
def _generators(monkeypatch):
    """These kernels are short rather than in NKI's subset of Python."""
    monkeypatch.setattr("nxd_cp.simulators.nki_api.jit.check_kernel", lambda *_: None)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", [stuck, unequal, racing])
def test_messages_are_the_same_each_time_and_in_every_thread(kernel, seed):
    expected = message(kernel, seed)
    assert expected is not None
    found = [message(kernel, seed) for _ in range(3)]
    threads = [threading.Thread(target=lambda: found.append(message(kernel, seed)))]
    threads += [threading.Thread(target=lambda: found.append(message(kernel, seed)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 5


def test_a_deadlock_prints_every_rank_and_its_line():
    kind, text = message(stuck, None)
    assert kind is NkiDeadlockError
    for rank in range(3):
        assert f"rank {rank} core 0: waits in nki.collectives.all_reduce for " in text
    assert text.count("ncc.all_reduce([src], [dst], group, nl.add)") == 3


def test_two_threads_of_ranks_do_not_mix(recwarn):
    """Different generations, dtypes and strictness at once; each thread keeps its own."""
    problems = []

    def work(i):
        make = torch.from_numpy if i % 2 else np.asarray
        for turn in range(3):
            x = X + 10 * i + turn
            strict = SimParams(strict=bool(i % 2))
            with parameters(strict):
                got = simulate_ranks(reduced, [(make(x.copy()),) for _ in range(3)])
            for part in got:
                if type(part) is not type(make(x)) or not np.array_equal(np.asarray(part), 3 * x):
                    problems.append((i, turn))
            if i == 3 and message(unequal, None) is None:
                problems.append("no error")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert not [w for w in recwarn if issubclass(w.category, NkiSimulatorWarning)]


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_ranks_take_numpy_arrays_and_torch_tensors(make):
    inputs = [make(X.copy() + i) for i in range(3)]
    for got in simulate_ranks(reduced, [(x,) for x in inputs]):
        assert type(got) is type(inputs[0])
        np.testing.assert_array_equal(np.asarray(got), 3 * X + 3)
