"""nki-sim, and the generated table of rules."""

import subprocess
import sys
from pathlib import Path

import pytest

from nxd_cp.simulators.nki_api.rules_table import rules_table

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import numpy as np
import nki
import nki.isa as nisa
import nki.language as nl
from constants import FACTOR


@nki.jit
def scale(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.load(x)
    if len(sys.argv) > 1 and sys.argv[1] == "fail":
        nisa.tensor_copy(tile, nl.ndarray(x.shape, dtype=x.dtype))
    nisa.tensor_scalar(tile, tile, nl.multiply, FACTOR)
    nl.store(out, tile)
    return out


out = scale(np.ones((128, 8), np.float32))
print(out.sum(), nisa.get_nc_version().name)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "constants.py").write_text("FACTOR = 3.0\n")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def nki_sim(*arguments):
    """A fresh process: install() changes sys.modules."""
    command = [sys.executable, "-m", "nxd_cp.simulators.nki_api.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_script_runs_as_if_nki_were_installed(script):
    done = nki_sim("--generation", "trn1", script, "an argument")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3072.0", "gen2"]
    assert nki_sim("--shape-only", script).stdout.split() == ["nan", "gen4"]


def test_a_broken_kernel_shows_the_users_line(script):
    done = nki_sim(script, "fail")
    assert done.returncode == 1
    line = done.stderr.rstrip().splitlines()[-1]
    assert "script.py:15: nisa.tensor_copy(tile, nl.ndarray" in line, done.stderr


def test_wrong_arguments_exit_with_2(script):
    unknown = nki_sim("--generation", "gen9", script)
    assert unknown.returncode == 2
    assert "expected a NeuronCore generation" in unknown.stderr
    assert nki_sim(script.parent / "missing.py").returncode == 2


def test_the_rules_page_is_current():
    page = ROOT / "docs" / "simulator_rules.md"
    assert page.read_text(encoding="utf-8") == rules_table(ROOT / "tests")


def test_any_exception_of_the_script_ends_with_1_and_its_own_lines(tmp_path):
    for code, last in (
        ("def f():\n    raise KeyError('mine')\nf()\n", "KeyError: 'mine'"),
        ("x = (1,\n", "SyntaxError: '(' was never closed"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("import nki.nothing\n", "No module named 'nki.nothing'"),
    ):
        path = tmp_path / "raises.py"
        path.write_text(code)
        done = nki_sim(path)
        assert done.returncode == 1, done.stderr
        assert done.stderr.rstrip().endswith(last), done.stderr
        assert "runpy" not in done.stderr
        assert "cli.py" not in done.stderr
        assert str(path) in done.stderr
    path.write_text("import sys\nsys.exit(7)\n")
    assert nki_sim(path).returncode == 7


def test_a_broken_kernel_shows_no_frame_of_the_simulator(script):
    shown = nki_sim(script, "fail").stderr
    assert shown.count('File "') == 2, shown
    assert "simulators/" not in shown
