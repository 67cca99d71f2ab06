"""nki.simulate and its environment: NKI_SIMULATOR, the target platform, NKI_PRECISE_FP."""

import inspect
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import torch
from nki_sim import load, nisa, nl, normal, own_rows, psum, sbuf, store

from nxd_cp.simulators.nki_api import Kernel, SimParams, parameters, record, simulate
from nxd_cp.simulators.nki_api import jit as nki_jit

X = normal(128, 8)
IMPRECISE = SimParams(precise_fp=False)
BF16 = ml_dtypes.bfloat16


def double(x):
    out, rows = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm), own_rows(128)
    tile = sbuf((rows.size, x.shape[1]), x.dtype)
    nisa.dma_copy(tile, x[rows])
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    nisa.dma_copy(out[rows], tile)
    return out


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_simulate_takes_kernels_grids_and_plain_functions(make):
    kernel = nki_jit.jit(double)
    for call in (simulate(kernel), simulate(kernel[2]), simulate(double), simulate(kernel)[2]):
        got = call(make(X))
        assert type(got) is type(make(X))
        assert np.array_equal(np.asarray(got), 2 * X)


def test_other_arguments_pass_through_and_inputs_are_updated_in_place():
    def kernel(x, scale, flag=False):
        tile = load(x)
        nisa.tensor_scalar(tile, tile, nl.multiply, scale if flag else 1.0)
        nisa.dma_copy(x, tile)
        return store(tile)

    x = torch.from_numpy(X.copy())
    assert torch.equal(simulate(kernel)(x, 3.0, flag=True), x)
    assert np.array_equal(x.numpy(), 3 * X)


SCRIPT = """
import numpy as np, torch
import nki, nki.isa as nisa, nki.language as nl

@nki.jit
def kernel(x):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(tile, x)
    nisa.tensor_scalar(tile, tile, nl.multiply, 1.0 + 2**-9)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(out, tile)
    return out, nisa.get_nc_version().name

for x in (np.ones((128, 4), np.float32), torch.ones(128, 4), torch.ones(128, 4).bfloat16()):
    out, version = kernel(x)
    print(type(out).__name__, out.dtype, version, float(out[0, 0]))
"""


def script(tmp_path, **variables):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NKI_", "NEURON_"))}
    command = [sys.executable, "-m", "nxd_cp.simulators.nki_api.cli", str(path)]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_script_runs_on_the_simulator_without_changes(tmp_path):
    exact = str(1 + 2**-9)
    assert script(tmp_path, NKI_SIMULATOR="1") == [
        f"ndarray float32 gen4 {exact}",
        f"Tensor torch.float32 gen4 {exact}",
        "Tensor torch.bfloat16 gen4 1.0",
    ]
    lines = script(tmp_path, NEURON_PLATFORM_TARGET_OVERRIDE="trn1", NKI_PRECISE_FP="0")
    assert lines[2] == f"Tensor torch.float32 gen2 {exact}"


def softmax_of_product(a, b):
    """exp(a.T @ b) in the dtype of the inputs, through PSUM and back."""
    left, right, product = load(a), load(b), psum((64, 64))
    nisa.nc_matmul(product, left, right)
    out = sbuf((64, 64), a.dtype)
    nisa.activation(out, nl.exp, product, scale=0.1)
    swapped = psum((64, 64), a.dtype)
    nisa.nc_transpose(swapped, out)
    nisa.tensor_copy(out, swapped)
    return store(out)


def test_precise_fp_0_keeps_low_precision_types_as_float32():
    a, b = normal(32, 64, seed=1).astype(BF16), normal(32, 64, seed=2).astype(BF16)
    true = np.exp(0.1 * (a.astype(np.float64).T @ b.astype(np.float64))).T
    rounded = Kernel(softmax_of_product, "gen3")(a, b)
    with parameters(IMPRECISE):
        wide = Kernel(softmax_of_product, "gen3")(a, b)
        as_torch = Kernel(softmax_of_product, "gen3")(
            *(torch.from_numpy(x.astype(np.float32)).bfloat16() for x in (a, b))
        )
    assert (rounded.dtype, wide.dtype, as_torch.dtype) == (BF16, np.float32, torch.float32)
    error = {
        name: np.abs(x.astype(np.float64) - true).max()
        for name, x in (("bf16", rounded), ("wide", wide))
    }
    assert error["wide"] < 2**-8 * error["bf16"]
    np.testing.assert_array_equal(as_torch.numpy(), wide)


@pytest.mark.parametrize("dtype", [BF16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3])
@pytest.mark.parametrize("address", [None, (0, 0)])
def test_precise_fp_0_in_placed_and_automatic_memory(dtype, address):
    def kernel(x):
        tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf, address=address)
        nisa.dma_copy(tile, x)
        nisa.tensor_scalar(tile[:, 2:6], tile[:, 2:6], nl.multiply, 1.0 + 2**-9)
        nisa.tensor_copy(tile[:, 0:2], tile[:, 4:6])
        return store(tile)

    x = np.ones((128, 8), dtype)
    grown = 1.0 + 2**-9
    with parameters(IMPRECISE):
        got = Kernel(kernel, "gen3")(x)
    assert got[0].tolist() == [grown] * 6 + [1.0] * 2
    assert (Kernel(kernel, "gen3")(x).astype(np.float32) == 1).all()


def test_precise_fp_0_changes_no_instruction_and_no_size():
    def logged(params):
        x = normal(32, 64).astype(BF16)
        with parameters(params), record() as log:
            Kernel(softmax_of_product, "gen3")(x, x)
        return list(log), log.buffers

    assert logged(IMPRECISE) == logged(SimParams())


def test_precise_fp_0_refuses_to_reinterpret_bits():
    def kernel(x):
        tile = load(x)
        nisa.tensor_copy(sbuf((128, 8), nl.uint16), tile.view(nl.uint16))

    x = X.astype(BF16)
    Kernel(kernel, "gen3")(x)
    with parameters(IMPRECISE), pytest.raises(NotImplementedError, match="NKI_PRECISE_FP=0"):
        Kernel(kernel, "gen3")(x)


def test_every_parameter_is_keyword_only_and_documented():
    fields = list(inspect.signature(SimParams).parameters.values())
    assert all(field.kind is field.KEYWORD_ONLY for field in fields)
    documentation = inspect.getdoc(SimParams) or ""
    assert all(f"\n{field.name}: " in documentation for field in fields)
