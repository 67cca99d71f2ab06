"""The list of names that public kernels use and the simulator lacks."""

import pytest

from nxd_cp.simulators.nki_api.used_names import covered, is_there, main, names_used, scan

KERNEL = """
import nki
import nki.isa as nisa
import nki.language as nl
from nki.isa import reduce_cmd
from nki.collectives import all_gather as gather

@nki.jit
def kernel(x):
    nisa.tensor_copy(x, x, engine=nisa.engine.vector)
    return nl.tile_size.pmax, reduce_cmd.idle, gather
"""


def test_names_are_followed_through_imports():
    assert names_used(KERNEL) == {
        "nki.isa",
        "nki.isa.engine",
        "nki.isa.engine.vector",
        "nki.isa.reduce_cmd",
        "nki.isa.reduce_cmd.idle",
        "nki.isa.tensor_copy",
        "nki.jit",
        "nki.language",
        "nki.language.tile_size",
        "nki.language.tile_size.pmax",
        "nki.collectives.all_gather",
    }
    assert names_used("import numpy as np\nnp.zeros(3)") == frozenset()


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("nki.isa.nc_matmul", True),
        ("nki.isa.engine.vector", True),
        ("nki.isa.engine.steam", False),
        ("nki.isa.topk", False),
        ("nki.language.softmax", True),
        ("nki.language.float8_e4m3fn_x4", False),
        ("nki.language.arange", False),
        ("nki.collectives.all_reduce", True),
        ("nki.dtype.bfloat16", True),
        ("nki.nothing.here", False),
    ],
)
def test_what_is_there(name, there):
    assert is_there(name) is there


def test_a_folder_is_counted_and_a_missing_name_fails_the_command(tmp_path, capsys):
    (tmp_path / "good.py").write_text(KERNEL)
    (tmp_path / "packed.py").write_text("import nki.language as nl\nt = nl.float8_e4m3fn_x4\n")
    (tmp_path / "broken.py").write_text("import nki.language as nl\ndef (\n")
    assert covered(scan([tmp_path])) == 1.0
    assert main([str(tmp_path)]) == 0
    assert "(left out)" in capsys.readouterr().out
    (tmp_path / "bad.py").write_text("import nki.isa as nisa\nnisa.tensor_copy_dynamic_src(1)\n")
    assert covered(scan([tmp_path])) == pytest.approx(2 / 3)
    assert main([str(tmp_path)]) == 1
    assert "nki.isa.tensor_copy_dynamic_src" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 1
