"""The blocks of the pages for NxD, installation, benchmarking and several nodes run."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from nxd_llama import Llama
from nxd_stand_ins import Optimizer, ParallelState
from packaging.requirements import Requirement
from ranks import RankGroup
from snippets import ROOT, run_bash, run_python, snippets, start_bash, write_files
from tiny_llama import batch, weights, whole_loss

DOCS, SETUP = ROOT / "docs", ROOT / "setup.py"


def stand_in_for_nxd(state: ParallelState) -> ModuleType:
    """The four functions of neuronx_distributed that the page calls, and parallel_state."""
    nxd = ModuleType("neuronx_distributed")
    made: list[str] = []

    def config(
        *, tensor_parallel_size: int, context_parallel_size: int, optimizer_config: Any
    ) -> Any:
        return {"tensor": tensor_parallel_size, "context": context_parallel_size}

    def model(sizes: dict[str, int], make: Any) -> Any:
        state.initialize_model_parallel(**sizes)
        made.append("groups")
        return make()

    def optimizer(sizes: Any, kind: Any, parameters: Any, **options: Any) -> Any:
        assert made, "the optimiser is made after the model"
        inner = kind(parameters, **options)
        wrapped = Optimizer(inner, state)
        return SimpleNamespace(step=wrapped.step, zero_grad=inner.zero_grad)

    nxd.neuronx_distributed_config = config
    nxd.initialize_parallel_model = model
    nxd.initialize_parallel_optimizer = optimizer
    return nxd


def run_the_migration(group: dist.ProcessGroup, page: Path) -> tuple[float, list[int]]:
    """Every Python block in one rank of TP 2 x CP 2; the last loss, and the heads seen."""
    state = ParallelState()
    layers = ModuleType("neuronx_distributed.parallel_layers")
    layers.parallel_state = state
    modules = {
        "neuronx_distributed": stand_in_for_nxd(state),
        "neuronx_distributed.parallel_layers": layers,
        "neuronx_distributed.parallel_layers.parallel_state": state,
    }
    modeling = SimpleNamespace(nki_ring_attn_func=None)
    names: dict[str, Any] = {
        "make_model": lambda: Llama(weights(), state.mine["tensor"], recompute=False),
        "loader": [batch(0, 0)],
        "modeling_llama_nxd": modeling,
    }
    with mock.patch.dict(sys.modules, modules):
        names = run_python(page, names)
    groups = [layer.attention.num_key_value_groups for layer in names["model"].layers]
    assert modeling.nki_ring_attn_func is not None
    return float(names["value"]), groups


def test_the_migration_page_runs_on_four_ranks_with_the_loss_of_one_device(
    ranks: RankGroup, tmp_path: Path
) -> None:
    page = DOCS / "migrating_from_nxd.md"
    expected = float(whole_loss(weights(), batch(0, 0)))
    for loss, groups in ranks.run(run_the_migration, page):
        assert abs(loss - expected) <= 1e-6 * expected
        assert set(groups) == {1}
    for block in snippets(page, "bash"):
        run_bash(block, tmp_path)


def test_the_install_page_runs(tmp_path: Path) -> None:
    printed = [run_bash(block, tmp_path) for block in snippets(DOCS / "install.md", "bash")]
    assert "stack: none" in printed[0]
    assert "legal: every hop" in printed[1]
    assert (tmp_path / "pairs.json").exists()


def test_the_benchmarking_page_runs(tmp_path: Path) -> None:
    page = DOCS / "benchmarking.md"
    for block in snippets(page, "bash"):
        printed = run_bash(block, tmp_path)
        assert "bench" not in block.text or "SIMULATED" in printed
    with contextlib.chdir(tmp_path) if sys.version_info >= (3, 11) else _chdir(tmp_path):
        names = run_python(page)
    assert names["fastest"].passed


@contextlib.contextmanager
def _chdir(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def free_port() -> str:
    """One that the system gives to nobody who asks for any, so that it is free a second later."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no free port")


def test_the_script_of_the_multi_node_page_runs_as_two_nodes(tmp_path: Path) -> None:
    page = DOCS / "multi_node.md"
    write_files(page, tmp_path)
    launch, *others = snippets(page, "bash")
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    nodes = [start_bash(launch, tmp_path, env | {"NODE_RANK": str(node)}) for node in (0, 1)]
    late = threading.Timer(90, lambda: [node.terminate() for node in nodes])  # torchrun's ranks too
    late.start()
    printed = [node.communicate()[0] for node in nodes]
    late.cancel()
    assert [node.returncode for node in nodes] == [0, 0], printed
    lines = sorted(line for text in printed for line in text.splitlines() if "chunk" in line)
    assert lines == [f"rank {rank} of 4: chunk {rank % 2} of 2" for rank in range(4)]
    (rings,) = others
    found = run_bash(rings, tmp_path)
    assert "linked chips" in found
    assert "between nodes" in found
    assert "estimated, not measured" in found


def test_versions_of_the_install_page_satisfy_the_extras() -> None:
    named = re.findall(r'"([a-z-]+)==([0-9.]+?)(?:\.\*)?"', (DOCS / "install.md").read_text())
    extras = re.findall(r'"((?:nki|torch-neuronx|neuronx-[a-z]+)[<>=][^"]+)"', SETUP.read_text())
    assert {name for name, _ in named} >= {"nki", "torch-neuronx", "neuronx-cc"}
    wanted = [Requirement(text) for text in extras]
    for name, version in named:
        if version != "2":  # the newest of a major version
            specifiers = [one.specifier for one in wanted if one.name == name]
            full = version if version.count(".") > 1 else f"{version}.3"
            assert any(full in specifier for specifier in specifiers), (name, version)
