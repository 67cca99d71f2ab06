"""Stand-in clones for the runner of public kernels: our own small kernels, laid out like theirs.

The library's driver and conftest are ours too; they meet the runner in the same places: command
line options, `nki_cpu_simulator`, `simulation_setup`, `Orchestrator._run_simulator_inference`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

_CONFTEST = """
import sys
import boto3
import pytest_html.extras
from test.utils import test_orchestrator
from test.utils.scripts.remote_lock_scripts import LockStatus


def pytest_addoption(parser):
    for name in ("--test-mode", "--platform-target", "--output-directory"):
        parser.addoption(name)
    parser.addoption("--force-local-cleanup", action="store_true")
    parser.addini("artifacts_dir", "a folder")


def pytest_configure(config):
    assert config.getoption("test_mode") == "simulation"
    from nki_cpu_simulator import nki
    import nki_cpu_simulator.nki.language as language
    import nki_cpu_simulator.nki.language.dtypes

    sys.modules["nki"] = nki
    sys.modules["nki.language"] = language
"""
_DRIVER = """
import os
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import nki
import numpy as np

INF_ARTIFACT_DIR_NAME = "result"


class InferenceException(Exception):
    pass


class TraceMode(Enum):
    TraceOnly = 1
    Simulator = 2


def normalize_golden_output(golden, rank=0):
    return golden(rank) if callable(golden) else golden


class PerRank:
    def __init__(self, of):
        self.for_rank = of


class Orchestrator:
    trace_mode = TraceMode.TraceOnly

    def _run_compilation(self):
        assert self.trace_mode is TraceMode.Simulator, "there is no tracer here"

    def _run_simulator_inference(self, test):
        os.environ["NKI_NC_VERSION"] = "gen3"
        lnc = test.compiler_input.logical_nc_config
        out = nki.cpu_simulate(test.kernel_func)[lnc](**test.kernel_input)
        golden = normalize_golden_output(test.validation_args.golden_output)
        assert self._compiled_kernel is None
        np.testing.assert_array_equal(out, golden["out"])

    def execute(self, kernel, inputs, golden, *, ranks=1, lnc=1):
        platform = SimpleNamespace(get_nc_gen=lambda: "gen3")
        self.fs_config = SimpleNamespace(artifacts_output_directory_path="output")
        test = SimpleNamespace(
            kernel_func=kernel,
            kernel_input=inputs,
            compiler_input=SimpleNamespace(logical_nc_config=lnc, platform_target=platform),
            inference_args=SimpleNamespace(collective_ranks=ranks),
            validation_args=SimpleNamespace(golden_output=golden),
        )
        self._run_compilation()
        folder = self._run_simulator_inference(test)
        if ranks > 1:
            for rank in range(ranks):
                want = golden(rank)["out"]
                got = np.fromfile(Path(folder) / f"output_worker_{rank}" / "out.bin", want.dtype)
                np.testing.assert_array_equal(got.reshape(want.shape), want)
"""
_KERNELS = '''
import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def double(x):
    """Twice the input.

    The end of this text,
    and of this line.
    """

    The end of this text,
    and of this line.
    """
    tile = nl.load(x)
    twice = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=twice, data=tile, op0=nl.multiply, operand0=2.0)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=twice)
    return out


@nki.jit
def halves(x):
    """Twice the first half; computes on the second half, which nobody wrote."""
    width = x.shape[1] // 2
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    twice = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[:, 0:width], src=x[:, 0:width])
    nisa.tensor_scalar(dst=twice, data=tile, op0=nl.multiply, operand0=2.0)
    out = nl.ndarray((x.shape[0], width), dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=twice[:, 0:width])
    return out


@nki.jit
def overwritten(x):
    first = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf, address=(0, 0))
    second = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf, address=(0, 0))
    nisa.dma_copy(dst=first, src=x)
    nisa.memset(dst=second, value=0)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=nl.add(first, second))
    return out


@nki.jit
def unwritten(x):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.activation(dst=out, op=nl.exp, data=tile)
    return out


@nki.jit
def newer(x):
    tile = nl.load(x)
    nisa.exponential(dst=tile, src=tile)
    return tile
'''
_GOOD = """
import time

import neuron_dtypes as dt
import numpy as np
import pytest
from nkilib_src.nkilib.kernels import double
from test.utils.test_orchestrator import Orchestrator, PerRank


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128, 256])
def test_double(width):
    if width == 16:
        pytest.skip("not on this chip")
    x = dt.static_cast(np.full((128, width), 1.5), np.float32)
    Orchestrator().execute(double, {"x": x}, {"out": 2 * x})


def test_two_cores():
    x = np.full((128, 8), 1.5, np.float32)
    Orchestrator().execute(double, {"x": x}, {"out": 2 * x}, lnc=2)


def test_ranks():
    def inputs(rank_id):
        return {"x": np.full((128, 8), rank_id, np.float32)}

    Orchestrator().execute(
        double, PerRank(inputs), lambda rank: {"out": 2 * inputs(rank)["x"]}, ranks=2
    )
"""
_BAD = """
import os
import signal
import time

import numpy as np
import pytest
from nkilib_src.nkilib.kernels import double, newer, unwritten
from test.utils.test_orchestrator import Orchestrator


def test_wrong_reference():
    x = np.ones((128, 8), np.float32)
    Orchestrator().execute(double, {"x": x}, {"out": 3 * x})


def test_broken_rule():
    x = np.ones((128, 8), np.float32)
    Orchestrator().execute(unwritten, {"x": x}, {"out": x})


def test_newer_chip():
    x = np.ones((128, 8), np.float32)
    Orchestrator().execute(newer, {"x": x}, {"out": x})


def test_slow():
    while True:
        pass


def test_large():
    np.ones(10 * 2**30, np.uint8)


@pytest.mark.parametrize(
    ("width", "dtype", "tpbSgCyclesSum"), [(8, np.float32, 987654321.0)]
)
def test_timed(width, dtype, tpbSgCyclesSum):
    pytest.skip("compared with nothing")
"""
_TOLERATED = """
import numpy as np
import pytest
from nkilib_src.nkilib.kernels import halves, overwritten
from test.utils.test_orchestrator import Orchestrator


@pytest.mark.parametrize("width", [8, 16, 32])
def test_halves(width):
    x = np.full((128, width), 1.5, np.float32)
    Orchestrator().execute(halves, {"x": x}, {"out": 2 * x[:, : width // 2]})


def test_overwritten():
    x = np.ones((128, 8), np.float32)
    Orchestrator().execute(overwritten, {"x": x}, {"out": x})
"""
_FILES = {
    "test/pytest.ini": "[pytest]\nlog_level = INFO\n",
    "test/__init__.py": "",
    "test/conftest.py": _CONFTEST,
    "test/utils/__init__.py": "",
    "test/utils/simulation_setup.py": "",
    "test/utils/test_orchestrator.py": _DRIVER,
    "src/nkilib_src/__init__.py": "",
    "src/nkilib_src/nkilib/__init__.py": "",
    "src/nkilib_src/nkilib/kernels.py": _KERNELS,
    "test/integration/nkilib/core/attention/test_attention_tkg.py": _TOLERATED,
    "test/integration/nkilib/core/cumsum/test_cumsum.py": _GOOD,
    "test/integration/nkilib/core/embeddings/test_rope.py": _BAD,
    "test/integration/nkilib/core/mlp/test_mlp_cte.py": "import no_such_module\n",
    "test/integration/nkilib/core/qkv/test_configs.py": "CONFIGS = ()\n",
    "test/integration/nkilib/core/qkv/test_qkv_cte.py": (
        "import os\n\n\ndef test_dies():\n    os._exit(7)\n"
    ),
}
_EXAMPLE = """
import nki
import nki.language as nl
import numpy as np
import torch
import torch_xla


@nki.jit
def add(a, b):
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=nl.add(nl.load(a), nl.load(b)))
    return out


if __name__ == "__main__":
    device = torch_xla.device()
    a = torch.ones((4, 3), dtype=torch.float16).to(device=device)
    b = torch.ones((4, 3), dtype=torch.float16).to(device=device)
    c = add(a, b)
    torch_xla.sync()
"""
_RING = """
import torch
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as xr
from allgather_matmul_ring_nki_kernels import double


def run_rank(rank):
    torch.manual_seed(0)
    x = torch.rand(xr.world_size(), 128, 8)[rank].to(xm.xla_device())
    out = double(x)
    xm.mark_step()
    assert torch.equal(out, 2 * x)


if __name__ == "__main__":
    xmp.spawn(run_rank, args=())
"""
_PARSES = _KERNELS.replace(
    '    """\n\n    The end of this text,\n    and of this line.\n    """\n', '    """\n'
)
_TUTORIALS = "src/nki_samples/tutorials"


def write(root: Path, files: dict[str, str]) -> Path:
    """The tree of files under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return root


def library(root: Path) -> Path:
    """A clone laid out like nki-library."""
    return write(root, _FILES)


def documentation(root: Path) -> Path:
    """A clone laid out like aws-neuron-sdk, with two of its examples."""
    examples = {
        "nki/examples/getting_started_torch.py": _EXAMPLE,
        "nki/examples/layout-dynamic-loop.py": "print(1\n",
        "nki/examples/layout-violation.py": _EXAMPLE,
    }
    return write(root, examples)


def samples(root: Path) -> Path:
    """A clone laid out like nki-samples: a ring of ranks, and one script of the old language."""
    ring = f"{_TUTORIALS}/allgather_matmul_ring/allgather_matmul_ring"
    files = {
        f"{ring}_torch.py": _RING,
        f"{ring}_nki_kernels.py": _PARSES,
        f"{_TUTORIALS}/fused_mamba/mamba_torch.py": "import neuronxcc.nki\n",
    }
    return write(root, files)
