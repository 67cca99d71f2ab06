"""Kernels as callables: arrays in and out, generations, threads, the log, errors of the user."""

import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from nki_sim import load, nisa, nl, normal, psum, run, sbuf, store

from nxd_cp.simulators.nki_api import (
    RULES,
    Kernel,
    NkiUnsupportedError,
    NkiValidationError,
    SimParams,
    parameters,
    record,
    simulate,
)
from nxd_cp.simulators.nki_api import log as flags
from nxd_cp.simulators.nki_api.jit import jit

X = normal(128, 8)


def double(x):
    tile, out = load(x), sbuf(x.shape, x.dtype)
    nisa.tensor_scalar(out, tile, nl.multiply, 2.0)
    return store(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_torch_in_torch_out(dtype):
    x = torch.arange(128 * 4).reshape(128, 4).to(dtype)
    got = simulate(double)(x)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == dtype
    assert torch.equal(got, x * 2)


def test_bf16_numpy_arrays_stay_bf16():
    got = simulate(double)(X.astype(ml_dtypes.bfloat16))
    assert got.dtype == ml_dtypes.bfloat16


def test_a_kernel_that_writes_an_input_changes_the_callers_array():
    def kernel(x):
        tile = sbuf(x.shape)
        nisa.memset(tile, 7.0)
        nisa.dma_copy(x, tile)

    for x in (X.copy(), np.asfortranarray(X), np.zeros((128, 16), np.float32)[:, ::2]):
        run(kernel, x)
        assert (x == 7).all()


def test_containers_of_arrays_and_results():
    def kernel(pair, options):
        return {"sum": double(pair[0]), "rest": [double(options["x"]), 3]}

    got = run(kernel, (X, X), {"x": X + 1})
    assert (got["sum"] == 2 * X).all()
    assert (got["rest"][0] == 2 * (X + 1)).all()
    assert got["rest"][1] == 3


def _generator(x):
    yield double(x)


async def _coroutine(x):
    return double(x)


@pytest.mark.parametrize(
    "kernel",
    [
        _generator,
        _coroutine,
        lambda x: {double(x)},
        lambda x: nisa.register_alloc(3),
        lambda x: x.ap([[8, 1], [1, 8]], scalar_offset=nisa.register_alloc(3), indirect_dim=0),
    ],
    ids=["generator", "coroutine", "set", "register", "indirect"],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_what_no_caller_could_use_is_no_result(kernel):
    """Above all a generator and a coroutine, of which not one line has run."""
    with pytest.raises(NkiValidationError, match=r"rule kernel\.output "):
        run(kernel, X)


def test_a_read_only_input_can_be_read_and_not_written():
    def write(x):
        nisa.dma_copy(x, sbuf_of_ones(x.shape))  # bad

    def sbuf_of_ones(shape):
        return nl.ones(shape, nl.float32)

    for array in (np.broadcast_to(X[0], X.shape), X.copy()):
        array.flags.writeable = False
        np.testing.assert_array_equal(run(double, array), 2 * array)
        with pytest.raises(NkiValidationError, match="read-only") as caught:
            run(write, array)
        assert "# bad" in str(caught.value).splitlines()[-1]


def test_a_masked_array_is_refused():
    with pytest.raises(ValueError, match="without a mask for 'x'"):
        run(double, np.ma.masked_greater(X, 0))


def test_a_tensor_of_another_call_is_caught():
    """As a helper that caches its tile would give it."""
    kept = []

    def keep(x):
        kept.extend([load(x), store(load(x))])

    def use(x, which):
        nisa.dma_copy(sbuf(x.shape), kept[which])  # bad

    run(keep, X)
    for which in (0, 1):
        with pytest.raises(NkiValidationError, match=r"rule tensor\.run ") as caught:
            run(use, X, which)
        assert "# bad" in str(caught.value).splitlines()[-1]


def test_64_bit_arrays_are_refused_by_name():
    with pytest.raises(ValueError, match="64-bit types do not exist"):
        run(double, X.astype(np.float64))


def test_an_output_must_be_in_shared_hbm():
    def on_chip(x):
        return load(x)

    def private(x):
        return nl.ndarray((4,), dtype=nl.float32, buffer=nl.private_hbm)

    for kernel in (on_chip, private):
        with pytest.raises(NkiValidationError, match=r"kernel\.output"):
            run(kernel, X)


def test_the_generation_is_the_kernels_or_the_environments(monkeypatch):
    def version():
        return nisa.get_nc_version().name, nl.tile_size.sbuf_fmax_bytes

    assert run(version, generation="trn1") == ("gen2", 180_224)
    assert Kernel(version)() == ("gen4", 245_752)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    assert Kernel(version)() == ("gen3", 212_984)
    with pytest.raises(ValueError, match="expected a NeuronCore generation"):
        run(version, generation="trn9")


def test_a_kernel_called_in_a_kernel_is_a_function():
    inner = Kernel(double, "gen3")

    def outer(x):
        return inner(x)

    assert (run(outer, X) == 2 * X).all()


def test_missing_functions_raise_by_name():
    with pytest.raises(NkiUnsupportedError, match=r"nki\.isa\.topk"):
        run(lambda x: nisa.topk(x, x), X)
    with pytest.raises(NkiUnsupportedError, match=r"nki\.language\.float8_e4m3fn_x4"):
        run(lambda x: nl.ndarray((4, 4), nl.float8_e4m3fn_x4), X)
    with pytest.raises(AttributeError, match="no_such_thing"):
        nisa.no_such_thing  # noqa: B018


def test_instructions_outside_a_kernel_say_so():
    with pytest.raises(RuntimeError, match="inside a kernel only"):
        nl.ndarray((128, 8), dtype=nl.float32)


def test_an_error_of_the_user_comes_through_and_leaves_nothing_behind():
    def broken(x):
        load(x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(broken, X)
    with pytest.raises(RuntimeError, match="inside a kernel only"):
        nl.ndarray((128, 8), dtype=nl.float32)
    assert (run(double, X) == 2 * X).all()


def test_threads_simulate_side_by_side():
    results: dict[int, bool] = {}

    def work(i):
        x = X + i
        generation = ("gen2", "gen3", "gen4")[i % 3]
        results[i] = all((run(double, x, generation=generation) == 2 * x).all() for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), True)


def test_the_log_has_one_record_per_instruction_with_line_and_views():
    with record() as log:
        run(double, X)
        run(double, X)
    assert [r.opcode for r in log] == ["dma_copy", "tensor_scalar", "dma_copy"] * 2
    scale = log[1]
    assert scale.engine == "vector"
    assert scale.file == __file__
    assert scale.elements == 8
    assert scale.dst.shape == (128, 8)
    assert log.buffers[scale.dst.buffer].space == "sbuf"
    assert log.buffers[log[2].dst.buffer].space == "hbm"
    assert log.counts()["dma_copy"] == 4
    run(double, X)
    assert len(log) == 6


def test_the_log_carries_what_a_cost_depends_on():
    def kernel(x):
        tile, total, product = load(x), sbuf((128, 1)), psum((8, 8))
        nisa.activation(
            tile,
            nl.exp,
            tile,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        for i in range(2):
            nisa.nc_matmul(
                product,
                tile[0:64],
                tile[0:64],
                accumulate=i > 0,
                is_moving_onezero=True,
                tile_position=(0, 0),
                tile_size=(64, 128),
            )
        nisa.dma_copy(sbuf((128, 8)), x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)

    with record() as log:
        run(kernel, X)
    assert log[1].detail == "exp"
    assert log[1].flags == flags.READ_ACCUMULATOR
    assert log[1].sources[-1].shape == (128, 1)
    assert log[2].flags == flags.ONEZERO | 64 << 8
    assert log[3].flags == flags.ONEZERO | flags.ACCUMULATE | 64 << 8
    assert log[4].detail == "hwdge:sync"


def test_parameters_are_frozen_and_local():
    with pytest.raises(AttributeError):
        SimParams().strict = True  # type: ignore[misc]
    with parameters(SimParams(strict=True)):
        assert (run(double, X) == 2 * X).all()


def test_every_rule_has_a_tier_a_source_and_a_sentence():
    for rule in RULES.values():
        assert rule.tier in ("documented", "inferred")
        assert rule.source
        assert rule.text


def test_the_simulator_imports_neither_torch_nor_nki():
    code = """if True:
        import sys, types
        sys.modules["torch"] = sys.modules["nki"] = None
        parent = sys.modules["nxd_cp"] = types.ModuleType("nxd_cp")  # which does need torch
        parent.__path__ = [sys.argv[1]]
        from nxd_cp.simulators import nki_api
        print(len(nki_api.RULES) > 0)
        """
    folder = str(Path(__file__).parents[1] / "nxd_cp")
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_options_of_jit_that_older_versions_took():
    @jit(debug_kernel=True, experimental_flags="anything")
    def with_options(x):
        return store(load(x))

    with pytest.warns(DeprecationWarning, match="mode"):
        traced = jit(mode="trace")(lambda x: store(load(x)))
    x = normal(4, 8)
    for kernel in (with_options, traced):
        np.testing.assert_array_equal(kernel(x), x)
    with pytest.raises(TypeError, match="NEURON_PLATFORM_TARGET_OVERRIDE"):
        jit(platform_target="trn1")
