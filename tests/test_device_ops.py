"""Launching kernels through registered ops, and compiling them: with stand-ins for the vendor's
packages that check how they are called. None of this has run on a device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nxd_cp.backends import device_ops, kernel_modules
from nxd_cp.backends.base import Scores
from nxd_cp.backends.device_ops import (
    DeviceModule,
    Launch,
    launch_cores,
    pack,
    record_launches,
    registered,
    stack_of,
    unpack,
)
from nxd_cp.backends.neuron import KernelBackend
from nxd_cp.bench.cases import Case
from nxd_cp.bench.compiled import compile_launch, launches, named_arguments
from nxd_cp.bench.implementations import OurKernels
from nxd_cp.bench.numerics import make_inputs
from nxd_cp.simulators.nki_api import load


class Kernel:
    """A jitted kernel: `kernel[cores](...)`; remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any, Any]] = []

    def __getitem__(self, cores: int) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: str, scale: float, **more: Any) -> Any:
            self.calls.append((cores, mask, more))
            o = (q.float() * scale) @ k.float().transpose(-1, -2) @ v.float()
            lse = q.float().sum(-1, keepdim=True)
            return o, lse, torch.cat((lse, torch.ones_like(lse)), dim=-1)

        return run


@pytest.fixture(autouse=True)
def _fresh_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_ops, "_OPS", {})
    monkeypatch.setattr(device_ops, "STACKS", {"cpu": "xla", "neuron": "native", "xla": "xla"})


def _qkv() -> list[Tensor]:
    return [torch.randn(1, 2, 4, 8) for _ in range(3)]


def test_arguments_survive_the_way_through_an_op() -> None:
    q, k, v = _qkv()
    args, kwargs = (q, "causal", 8**-0.5, None, ()), {"carry": (k, v), "n": 3, "on": True}
    tensors, call = pack(args, kwargs, 2)
    assert [id(x) for x in tensors] == [id(q), id(k), id(v)]
    args_back, kwargs_back, cores = unpack(tensors, call)
    assert args_back[0] is q
    assert args_back[1:] == ["causal", 8**-0.5, None, ()]
    assert kwargs_back["carry"][1] is v
    assert (kwargs_back["n"], kwargs_back["on"], cores) == (3, True, 2)
    with pytest.raises(ValueError, match="expected tensors, tuples of them and constants"):
        pack((object(),), {}, 1)


def test_an_xla_kernel_is_a_custom_op_with_its_cores_and_keywords() -> None:
    kernel = Kernel()
    module = DeviceModule(SimpleNamespace(flash_fwd=kernel, EMPTY=7.0), "flash_fwd")
    q, k, v = _qkv()
    results = module.flash_fwd[2](q, k, v, "causal", 0.5, bounds=(q,))
    for found, expected in zip(results, kernel[1](q, k, v, "causal", 0.5), strict=True):
        assert torch.equal(found, expected)
    cores, mask, more = kernel.calls[0]
    assert (cores, mask, set(more)) == (2, "causal", {"bounds"})
    assert module.EMPTY == 7.0
    module.flash_fwd(q, k, v, "full", 0.5)
    assert kernel.calls[-1][0] == 1


def test_shapes_without_data_need_no_kernel() -> None:
    op = registered("flash_fwd", Kernel(), "xla")
    backward = registered("flash_bwd", Kernel(), "xla")
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 6, 8), torch.empty(2, 2, 5, 8), torch.empty(2, 2, 5, 3)
        results = op([q, k, v], "")
        assert [tuple(x.shape) for x in results] == [(2, 4, 6, width) for width in (3, 1, 2)]
        assert {x.dtype for x in results} == {torch.float32}
        grads = backward([q, q.bfloat16(), k, v], "")
        assert [tuple(x.shape) for x in grads] == [(2, 4, 6, 8), (2, 2, 5, 8), (2, 2, 5, 3)]
        assert {x.dtype for x in grads} == {torch.float32}


def test_a_native_kernel_is_registered_with_nki_op() -> None:
    seen: list[tuple[str, Any]] = []

    def nki_op(name: str, fn: Any = None, mutates_args: Any = None) -> Any:
        assert fn is None, "the documented form is a decorator"
        seen.append((name, mutates_args))
        return torch.library.custom_op("nxd_cp_stand_in::flash_fwd", mutates_args=())

    stand_in = SimpleNamespace(nki_op=nki_op)
    kernel = Kernel()
    with mock.patch.dict("sys.modules", {"torch_neuronx": stand_in}):
        op = registered("flash_fwd", kernel, "native")
    tensors, call = pack((*_qkv(), "full", 1.0), {}, 1)
    assert len(op(tensors, call)) == 3
    assert seen == [("nxd_cp::flash_fwd", {})]
    assert registered("flash_fwd", kernel, "native") is op


@pytest.mark.parametrize(
    ("given", "chip", "cores"),
    [("1", "trn2", 1), ("2", "trn1", 2), (None, "trn2", 2), (None, "trn3", 2), (None, "inf2", 1)],
)
def test_a_launch_has_the_cores_that_the_runtime_groups(
    monkeypatch: pytest.MonkeyPatch, given: str | None, chip: str, cores: int
) -> None:
    monkeypatch.delenv(device_ops.LNC_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(device_ops.LNC_VARIABLE, given)
    utils = SimpleNamespace(get_platform_target=lambda: chip)
    assert launch_cores(lambda name: utils) == cores


def test_unknown_cores_are_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(device_ops.LNC_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="expected NEURON_LOGICAL_NC_CONFIG=1 or 2"):
        launch_cores()
    monkeypatch.setenv(device_ops.LNC_VARIABLE, "4")
    with pytest.raises(ValueError, match="expected 1 or 2, got '4'"):
        launch_cores()


@pytest.mark.parametrize("stand_in", [None, SimpleNamespace()], ids=["absent", "XLA's"])
def test_without_nki_op_the_error_names_the_version(stand_in: Any) -> None:
    with (
        mock.patch.dict("sys.modules", {"torch_neuronx": stand_in}),
        pytest.raises(ValueError, match=r"native torch-neuronx \(2.13.3 or newer\)"),
    ):
        registered("flash_fwd", Kernel(), "native")


def test_tensors_on_no_neuron_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert stack_of(torch.device("xla")) == "xla"
    with pytest.raises(ValueError, match="expected tensors on a Neuron device"):
        stack_of(torch.device("cpu"))


@pytest.mark.parametrize("cores", [1, 2])
def test_backend_nki_runs_the_kernels_through_their_ops(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """With the simulator's kernels under the ops the results are those of backend "simulate"."""
    kernels = load("nxd_cp.kernels", generation="gen3")
    names = ("flash_fwd", "flash_bwd", "row_delta", "merge", "permute", "tiles")
    modules = {f"nxd_cp.kernels.{n}": getattr(kernels, n) for n in names}
    simulated = KernelBackend("simulate", "gen3", cores=cores)
    monkeypatch.setattr(kernel_modules, "has_nki", lambda: True)
    monkeypatch.setattr(kernel_modules.importlib, "import_module", modules.__getitem__)
    device = KernelBackend("nki", cores=cores)
    monkeypatch.undo()
    monkeypatch.setattr(device_ops, "_OPS", {})
    monkeypatch.setattr(device_ops, "STACKS", {"cpu": "xla"})
    case = Case(queries=128, keys=128, num_heads=2, num_kv_heads=2, head_dim=32)
    for kernel in ("flash_fwd", "flash_bwd"):
        x = make_inputs(replace(case, kernel=kernel))
        found, expected = (
            OurKernels(backend).prepare(replace(case, kernel=kernel), x)()
            for backend in (device, simulated)
        )
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted)
    assert {name for name, _ in device_ops._OPS} == {"flash_fwd", "flash_bwd"}


def flash_fwd(q: Any, k: Any, v: Any, mask: str, scale: float, carry: Any = ()) -> None:
    """The signature of a kernel; never called."""
    raise AssertionError("recorded launches are not made")


class Host:
    """A backend that launches once, as KernelBackend does."""

    name = "nki"

    def __init__(self) -> None:
        self.module = DeviceModule(SimpleNamespace(flash_fwd=flash_fwd), "flash_fwd")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Any:
        return self.module.flash_fwd[2](q, k, v, scores.mask, scores.scale, carry=(q, k))


def test_launches_are_recorded_and_not_made() -> None:
    case = Case(queries=128, keys=256, mask="full", head_dim=16)
    (launch,) = launches(case, OurKernels(Host()))
    assert (launch.name, launch.cores) == ("flash_fwd", 2)
    named = named_arguments(launch)
    assert list(named) == ["q", "k", "v", "mask", "scale", "carry"]
    assert named["q"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(named["k"].astype(np.float32), launch.args[1].float().numpy())
    assert (named["mask"], len(named["carry"])) == ("full", 2)
    with record_launches() as none:
        pass
    assert none == []


class Frontend:
    """nki.compiler.frontend.ParserFrontend, as nki-library's harness calls it."""

    def compile(
        self, kernel: Any, *, inputs: Any, target: str, lnc: int, artifacts_dir: str
    ) -> Any:
        assert kernel is flash_fwd
        if target == "trn1":
            raise RuntimeError("\nNCC_ILLC059: not on gen2\nmore")
        return SimpleNamespace(inputs=inputs, target=target, lnc=lnc)


def _driver(name: str) -> Any:
    def from_frontend(found: Any, options: Any) -> Any:
        assert (options.target, options.lnc) == (found.target, found.lnc) == ("trn2", 2)
        folder = Path(options.artifacts_dir)
        folder.mkdir()
        (folder / "log-neuron-cc.txt").write_text("begin\nEstimated latency: 12 us\nend\n")
        Path(options.output_path).write_bytes(b"neff")
        return SimpleNamespace(neff_path=options.output_path, total_time_ns=12_500)

    modules = {
        "nki.compiler.frontend": SimpleNamespace(ParserFrontend=Frontend),
        "nki.compiler.ncc_driver": SimpleNamespace(
            CompileOptions=SimpleNamespace,
            CompiledKernel=SimpleNamespace(from_frontend=from_frontend),
        ),
    }
    return modules[name]


def test_a_launch_is_compiled_with_its_cores_and_errors_are_kept(tmp_path: Path) -> None:
    q, k, v = _qkv()
    launch = Launch(flash_fwd, "flash_fwd", (q, k, v, "full", 1.0), {}, 2)
    good = compile_launch(launch, "trn2", "case", tmp_path / "good", _driver)
    assert good.error == ""
    assert good.neff is not None
    assert good.neff.read_bytes() == b"neff"
    assert good.estimates == ("total_time_ns = 12500", "Estimated latency: 12 us")
    bad = compile_launch(launch, "trn1", "case", tmp_path / "bad", _driver)
    assert (bad.neff, bad.error) == (None, "RuntimeError: NCC_ILLC059: not on gen2")
    absent = compile_launch(launch, "trn2", "case", tmp_path / "absent")
    assert absent.error.startswith("ModuleNotFoundError")
