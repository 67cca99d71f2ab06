"""load() gives private copies bound to the simulator; install() never hides a real nki."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from nxd_cp.simulators.nki_api import load

FILES = {
    "__init__.py": "",
    "shared.py": """
        import dataclasses
        import nki.language as nl

        WIDTH = 8

        @dataclasses.dataclass
        class Config(nl.NKIObject):
            factor: "float" = 2.0
        """,
    "double.py": """
        import {name}.shared
        import nki
        import nki.isa as nisa
        from nki import language as nl
        from {name} import shared as again
        from {name}.shared import Config
        from . import shared
        from .inner.deep import helper

        assert shared is again is {name}.shared

        @nki.jit
        def double(x, config=Config()):
            return helper(x, config.factor)

        @nki.jit
        def version():
            return nisa.get_nc_version().name
        """,
    "inner/deep.py": """
        import nki.isa as nisa
        import nki.language as nl
        from ..shared import WIDTH

        def helper(x, factor):
            tile = nl.ndarray((128, WIDTH), dtype=x.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=x)
            nisa.tensor_scalar(tile, tile, nl.multiply, factor)
            out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
            nisa.dma_copy(dst=out, src=tile)
            return out
        """,
    "broken.py": "import nki.no_such_module\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A kernel package on sys.path; its name is unique per test because copies are cached."""
    name = "kernels_" + tmp_path.name.replace("-", "_")
    for file, text in FILES.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).replace("{name}", name))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_loaded_package_simulates_and_leaves_the_process_alone(package):
    before = set(sys.modules)
    copy = load(package, generation="gen3")
    x = np.ones((128, 8), np.float32)
    assert (copy.double.double(x) == 2).all()
    assert (copy.nki.simulate(copy.double.double)(x) == 2).all()
    new = set(sys.modules) - before
    assert package not in sys.modules
    assert "nki" not in sys.modules
    assert all(name.startswith("nki_simulated_gen3.") for name in new), new


def test_copies_are_cached_by_package_and_generation(package):
    assert load(package, generation="trn2") is load(package, generation="gen3")
    for generation in ("gen2", "gen3", "gen4"):
        assert load(package, generation=generation).double.version() == generation
    gen2, gen3 = load(package, generation="gen2"), load(package, generation="gen3")
    assert gen2.shared.Config is not gen3.shared.Config


def test_absolute_relative_and_plain_imports_are_one_private_module(package):
    copy = load(package, generation="gen3")
    assert copy.double.shared is copy.shared
    assert copy.double.Config is copy.shared.Config
    assert copy.inner.deep.WIDTH == 8


def test_the_real_package_can_be_imported_beside_it(package):
    copy = load(package, generation="gen3")
    sys.modules["nki"] = stand_in = type(sys)("nki")
    try:
        stand_in.__path__ = []
        with pytest.raises(ModuleNotFoundError, match=r"nki\.language"):
            __import__(f"{package}.shared")
        assert copy.shared.WIDTH == 8
    finally:
        del sys.modules["nki"]
        for name in [n for n in sys.modules if n.startswith(package)]:
            del sys.modules[name]


def test_missing_modules_and_failed_imports_are_reported(package):
    copy = load(package, generation="gen3")
    with pytest.raises(AttributeError, match="nothing"):
        copy.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"nki\.no_such_module"):
        load(f"{package}.broken", generation="gen3")
    with pytest.raises(ModuleNotFoundError):
        load("no_such_package_at_all", generation="gen3")


def test_our_own_kernels_load_for_every_generation():
    for generation in ("gen2", "gen3", "gen4"):
        assert callable(load("nxd_cp.kernels", generation=generation).flash_fwd.flash_fwd)


def _python(code, **env):
    script = "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(code)
    root = str(__import__("pathlib").Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", script, root],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", **env},
    )


def test_install_makes_import_nki_work():
    done = _python(
        """
        from nxd_cp.simulators.nki_api import install
        install()
        install()
        import nki, nki.isa as nisa, nki.language as nl
        from nki.isa.constants import engine
        @nki.jit
        def kernel():
            return nisa.get_nc_version().name, engine is nisa.engine
        print(kernel())
        """,
        NEURON_PLATFORM_TARGET_OVERRIDE="trn1",
    )
    assert done.stdout.strip() == "('gen2', True)", done.stderr


@pytest.mark.parametrize("real", [False, True])
def test_a_real_nki_is_not_hidden_and_a_placeholder_counts_as_absent(tmp_path, real):
    (tmp_path / "nki").mkdir()
    (tmp_path / "nki" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    if real:
        (tmp_path / "nki" / "language.py").write_text("")
    done = _python(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        from nxd_cp.simulators.nki_api import install, real_nki_present
        print(real_nki_present())
        install()
        import nki.language
        print(nki.__simulated__)
        """)
    assert done.stdout.splitlines()[0] == str(real), done.stderr
    if real:
        assert "a real nki is installed" in done.stderr
    else:
        assert done.stdout.splitlines()[1] == "True", done.stderr
