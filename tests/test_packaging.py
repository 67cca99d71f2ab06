"""The wheel holds the whole package, installs beside another package called `kernels`, and the
placeholder packages that PyPI has under the Neuron names count as absent.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nxd_cp

ROOT = Path(__file__).parent.parent
PLACEHOLDERS = {  # name on PyPI: newest version that is a placeholder
    "nki": "0.0.1",
    "torch-neuronx": "1.0",
    "neuronx-cc": "1.0.post1",
    "neuronx-distributed": "0.1",
}
FLOORED_EXTRAS = ("nki", "xla", "native", "nxd")


def _run(python: Path | str, code: str, cwd: Path, path: Path | None = None) -> str:
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(python), "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "nxd-cp"
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "out", "tests"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    out = source.parent / "wheel"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of a fresh environment with the wheel, this environment's torch, and a stand-in."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(
        _run(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder).strip()
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=100)
    # A path file adds the folder of torch without running the path files that lie in it, so an
    # editable install of this package there stays out of sight.
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("MARK = 'the other package'\n")
    return python


def _modules_on_disk() -> set[str]:
    folders = {"nxd_cp": ROOT / "nxd_cp"}
    folders |= {f"nxd_cp/{top}": ROOT / top for top in ("kernels", "simulators")}
    found = set()
    for name, folder in folders.items():
        for file in folder.rglob("*.py"):
            found.add(f"{name}/{file.relative_to(folder)}")
    return {name for name in found if "__pycache__" not in name}


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == _modules_on_disk()
    assert "nxd_cp/py.typed" in names
    assert wheel.name.startswith(f"nxd_cp-{nxd_cp.__version__}-")
    assert any(name.endswith("LICENSE") for name in names)


def test_every_public_name_imports_from_the_wheel_beside_the_other_kernels(installed, tmp_path):
    code = """
import nxd_cp, kernels
assert kernels.MARK == 'the other package', kernels
assert 'site-packages' in nxd_cp.__file__, nxd_cp.__file__
for name in nxd_cp.__all__:
    getattr(nxd_cp, name)
print(' '.join(nxd_cp.__all__))
"""
    names = _run(installed, code, tmp_path).split()
    assert "ring_attention" in names
    assert "CPContext" in names


def test_every_module_is_found_in_the_wheel(installed, tmp_path):
    modules = sorted(
        re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".") for name in _modules_on_disk()
    )
    # Kernels import `nki`, which is not here: those are looked up and not executed.
    code = f"""
import importlib, importlib.util
for name in {modules!r}:
    if name.startswith('nxd_cp.kernels.'):
        assert 'site-packages' in importlib.util.find_spec(name).origin, name
    else:
        importlib.import_module(name)
"""
    _run(installed, code, tmp_path)


@pytest.mark.parametrize("where", ["root of the clone", "elsewhere"])
def test_the_other_kernels_package_is_not_shadowed(installed, tmp_path, where):
    cwd = ROOT if where == "root of the clone" else tmp_path
    assert (
        _run(installed, "import kernels; print(kernels.MARK)", cwd).strip() == "the other package"
    )


def test_a_shadowed_kernels_package_is_caught(installed, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'ours, with an __init__.py'\n")
    printed = _run(installed, "import kernels; print(kernels.MARK)", tmp_path)
    assert printed.strip() != "the other package"


def test_import_needs_torch_alone(tmp_path):
    code = """
import sys
absent = ['numpy', 'ml_dtypes', 'typer', 'rich', 'matplotlib', 'einops', 'nki', 'neuronxcc']
for name in absent:
    sys.modules[name] = None
import nxd_cp
loaded = [n for n in sys.modules if n.startswith(('nxd_cp.kernels', 'nxd_cp.simulators'))]
assert not loaded, loaded
"""
    _run(sys.executable, code, tmp_path, path=ROOT)


def test_no_placeholder_satisfies_an_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        lines = archive.read(name).decode().splitlines()
    requirements = [
        Requirement(x.split(":", 1)[1]) for x in lines if x.startswith("Requires-Dist:")
    ]
    seen = set()
    for requirement in requirements:
        extras = [x for x in FLOORED_EXTRAS if f'"{x}"' in str(requirement.marker)]
        for extra in extras:
            seen.add(extra)
            version = PLACEHOLDERS[requirement.name]
            assert not requirement.specifier.contains(version, prereleases=True), requirement
    assert seen == set(FLOORED_EXTRAS)


@pytest.fixture
def placeholders(tmp_path):
    """A folder laid out as the PyPI placeholders install themselves."""
    site = tmp_path / "placeholders"
    for name in ("nki", "torch_neuronx"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise ImportError('WRONG PACKAGE')\n")
    for name in ("neuronx-cc", "neuronx-distributed"):  # a hyphen: nothing to import
        (site / name).mkdir()
    return site


def test_placeholder_packages_count_as_absent(placeholders, tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(placeholders)!r}, {str(ROOT)!r}]
import torch
from nxd_cp.backends import get_backend
try:
    get_backend('nki', torch.device('cpu'))
except ValueError as error:
    assert 'placeholder' in str(error) and 'simulate' in str(error), error
else:
    raise AssertionError('backend nki was accepted')
assert get_backend('simulate', torch.device('cpu')).name == 'simulate'
assert get_backend('auto', torch.device('cpu')).name == 'torch'
assert 'nki' not in sys.modules, 'the simulator took the place of nki for the whole process'
"""
    _run(sys.executable, code, tmp_path)


def test_install_of_the_simulator_replaces_a_placeholder(placeholders, tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(placeholders)!r}, {str(ROOT)!r}]
from nxd_cp.simulators.nki_api import install
install()
import nki, nki.language, nki.isa
assert callable(nki.jit)
"""
    _run(sys.executable, code, tmp_path)


def test_python_m_nxd_cp_is_the_command():
    command = [sys.executable, "-m", "nxd_cp", "plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
