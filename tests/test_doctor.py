"""`nxd-cp doctor`: placeholders are absent, the backend has a reason, rings need links."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.doctor import packages
from nxd_cp.doctor.machine import Machine, look, read_table
from nxd_cp.doctor.packages import Found, Wanted, find
from nxd_cp.doctor.ring import check_ring, torus_links
from nxd_cp.doctor.tier import decide

NKI = Wanted("nki", "nki", "jit", "kernels")
NOTHING = Machine(0, "", None, {}, {})
TRN2 = Machine(16, "trn2.48xlarge", 2, {}, {})

# The form of the table in the Neuron SDK's page on neuron-ls, with other values.
TABLE = """
instance-type: trn2.48xlarge
instance-id: i-0
logical-neuroncore-config: 2
+--------+--------+----------+--------+---------------+---------+
| NEURON | NEURON |  NEURON  | NEURON |   CONNECTED   |   PCI   |
| DEVICE | CORES  | CORE IDS | MEMORY |    DEVICES    |   BDF   |
+--------+--------+----------+--------+---------------+---------+
| 0      | 4      | 0-3      | 96 GB  | 12, 3, 4, 1   | 00:00.0 |
| 13     | 4      | 52-55    | 96 GB  | 9, 12, 1, 14  | 00:01.0 |
+--------+--------+----------+--------+---------------+---------+
"""


def _load(error: Exception | None = None, **attributes: Any) -> Any:
    def load(name: str) -> ModuleType:
        if error is not None:
            raise error
        module = ModuleType(name)
        module.__dict__.update(attributes)
        return module

    return load


@pytest.mark.parametrize(
    ("version", "load", "state"),
    [
        ("0.6.0", _load(jit=print), "present"),
        (None, _load(ModuleNotFoundError("no", name="nki")), "absent"),
        ("0.0.1", _load(ImportError("\n*** WRONG PACKAGE ***")), "placeholder"),
        ("1.0", _load(ModuleNotFoundError("no", name="nki")), "placeholder"),
        ("0.0.2", _load(), "placeholder"),
        ("0.6.0", _load(ImportError("libnrt.so.1: cannot open")), "broken"),
        ("0.6.0", _load(ModuleNotFoundError("no", name="numpy")), "broken"),
        ("0.6.0", _load(RuntimeError("driver too old")), "broken"),
        (None, _load(jit=print, __simulated__=True), "absent"),
    ],
)
def test_a_package_counts_only_when_it_works(
    monkeypatch: pytest.MonkeyPatch, version: str | None, load: Any, state: str
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(packages.importlib.metadata, "version", found)
    assert find(NKI, load).state == state


def _packages(*present: str) -> list[Found]:
    names = ("nki", "torch-neuronx", "torch-xla", "numpy", "ml_dtypes")
    return [Found(n, "present" if n in present else "absent", "1", "") for n in names]


@pytest.mark.parametrize(
    ("present", "machine", "stack", "backend", "reason"),
    [
        ((), NOTHING, "none", "torch", "no torch-neuronx"),
        (("torch-neuronx", "nki"), TRN2, "native", "nki", "without torch-xla is the native one"),
        (("torch-neuronx", "torch-xla", "nki"), TRN2, "xla", "nki", "issue 1189"),
        (("torch-neuronx", "nki"), NOTHING, "native", "torch", "no /dev/neuron"),
        (("torch-neuronx",), TRN2, "native", "torch", "no nki"),
        (("numpy", "ml_dtypes"), NOTHING, "none", "torch", '"simulate" runs'),
    ],
)
def test_the_backend_follows_from_what_is_there_with_a_reason(
    present: tuple[str, ...], machine: Machine, stack: str, backend: str, reason: str
) -> None:
    tier = decide(_packages(*present), machine)
    assert (tier.stack, tier.backend) == (stack, backend)
    assert any(reason in line for line in tier.reasons)


def test_a_placeholder_is_named_among_the_reasons() -> None:
    found = Found("nki", "placeholder", "0.0.1", "", "WRONG PACKAGE")
    assert any("nki 0.0.1: placeholder (WRONG" in x for x in decide([found], NOTHING).reasons)


def test_the_table_of_neuron_ls_is_read() -> None:
    assert read_table(TABLE) == ("trn2.48xlarge", 2, {0: (12, 3, 4, 1), 13: (9, 12, 1, 14)})
    assert read_table("") == ("", None, {})


def test_the_torus_has_the_links_that_neuron_ls_shows() -> None:
    _, _, links = read_table(TABLE)
    assert {chip: set(linked) for chip, linked in links.items()} == {
        chip: set(torus_links()[chip]) for chip in links
    }


def test_devices_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("neuron0", "neuron1", "neuron_link", "null"):
        (tmp_path / name).touch()
    machine = look(tmp_path)
    assert machine.num_devices == 2
    assert machine.variables["NEURON_RT_NUM_CORES"] == "2"
    assert Machine(1, "trn1.32xlarge", None, {}, {}).chip == "trn1"
    assert machine.chip == ""


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 3", "exit status 3, nothing on stderr"),
        ("echo driver is not loaded >&2; exit 1", "exit status 1, driver is not loaded"),
        ("echo instance-type: trn1.2xlarge", ""),
    ],
)
def test_a_neuron_ls_that_fails_is_named_among_the_reasons(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neuron0").touch()
    command = tmp_path / "neuron-ls"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = look(tmp_path)
    assert machine.problem == problem
    assert machine.instance == ("" if problem else "trn1.2xlarge")
    named = [line for line in decide([], machine).reasons if line.startswith("neuron-ls: ")]
    assert len(named) == bool(problem)


# What NxD 0.18.0's parallel_state.py notes of trn2: TP x groups with LNC.
@pytest.mark.parametrize(
    ("tp", "lnc", "legal"),
    [
        (32, 1, True),
        (8, 1, True),
        (4, 1, True),
        (64, 1, True),  # by pairs of rows
        (16, 1, False),
        (4, 2, True),
        (16, 2, True),
        (32, 2, True),  # by pairs of rows
        (8, 2, False),
    ],
)
def test_rings_of_two_on_trn2_are_legal_where_nxd_says_so(tp: int, lnc: int, legal: bool) -> None:
    verdict = check_ring(
        chip="trn2",
        world_size=128 // lnc,
        tensor_parallel_size=tp,
        context_parallel_size=2,
        lnc=lnc,
    )
    assert verdict.legal is legal, verdict.text


def test_rings_over_nodes_and_within_a_chip_are_legal_and_said_so() -> None:
    over = check_ring(chip="trn1", world_size=64, tensor_parallel_size=32, context_parallel_size=2)
    assert over.legal
    assert {hop.link for hop in over.hops} == {"between nodes"}
    within = check_ring(chip="trn1", world_size=32, tensor_parallel_size=1, context_parallel_size=2)
    assert {hop.link for hop in within.hops} == {"same chip"}


def test_links_of_the_machine_are_used_and_a_missing_one_is_caught() -> None:
    sizes = {"chip": "trn2", "world_size": 64, "lnc": 2}
    sizes |= {"tensor_parallel_size": 4, "context_parallel_size": 4}
    assert check_ring(**sizes, links=torus_links()).legal
    broken = torus_links() | {3: (2, 7, 15)}
    verdict = check_ring(**sizes, links=broken)
    assert verdict.legal is False
    assert "from rank 12 to rank 0" in verdict.text


def test_unknown_chips_and_impossible_sizes_are_not_called_legal() -> None:
    sizes = {"world_size": 64, "tensor_parallel_size": 4, "context_parallel_size": 4}
    assert check_ring(chip="trn3", **sizes).legal is None
    with pytest.raises(ValueError, match="no TP = 4 with CP = 4 on trn1"):
        check_ring(chip="trn1", **sizes)
    with pytest.raises(ValueError, match="lnc: expected 1"):
        check_ring(chip="trn1", lnc=2, **sizes)


def test_the_command_prints_packages_backend_and_rings(tmp_path: Path) -> None:
    run = CliRunner().invoke
    text = run(app, ["doctor"])
    assert text.exit_code == 0, text.output
    assert "neuronx-distributed" in text.output
    found = json.loads(run(app, ["doctor", "--json"]).output)
    assert found["tier"]["backend"] == "torch"
    good = run(app, ["doctor", "ring", "--lnc", "2"])
    assert good.exit_code == 0
    assert "first ring: 0 -> 4 -> 8 -> 12 -> 0" in good.output
    path = tmp_path / "made" / "pairs.json"
    sizes = ["--chip", "trn1", "--world", "4", "--tp", "2", "--cp", "2"]
    assert run(app, ["doctor", "ring", *sizes, "--pairs", str(path)]).exit_code == 0
    assert json.loads(path.read_text()) == {"src_target_pairs": [[[0, 2], [2, 0], [1, 3], [3, 1]]]}
    bad = run(app, ["doctor", "ring", "--tp", "8", "--lnc", "2"])
    assert bad.exit_code == 1
    assert "not legal" in bad.output
    assert run(app, ["doctor", "ring", "--chip", "trn1", "--tp", "4"]).exit_code == 2
