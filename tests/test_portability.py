"""Our kernels use what NKI 0.2 to 0.6 have in common, and the checker sees what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nxd_cp.cli import app
from nxd_cp.portability import check_folder, check_source
from nxd_cp.simulators.nki_api import load
from nxd_cp.simulators.nki_api.tensor import NkiTensor

KERNELS = Path(__file__).parent.parent / "kernels"

PLANTED = [
    ("if x is None: pass", "`is` and `is not`"),
    ("if x is not y: pass", "`is` and `is not`"),
    ("def kernel(a, *, b=1): pass", "`*`, `/`"),
    ("def kernel(*tiles): pass", "`*`, `/`"),
    ("def kernel(a, sizes=[1, 2]): pass", "list arguments"),
    ("import neuronxcc.nki as nki", "removed in 0.4"),
    ("from neuronxcc.nki import isa", "removed in 0.4"),
    ("t = nl.ndarray((128, 4), dtype=nl.float32, buffer='sbuf')", "named by a string"),
    ("t = nl.ndarray((128, 4), nl.float32, nl.sbuf, address=(0, 0))", "parameter address"),
    ("t = nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.hbm)", "nl.shared_hbm"),
    ("for i in nl.dynamic_range(4): pass", "nl.dynamic_range"),
    ("i = nl.arange(4)", "nl.arange"),
    ("nl.fori_loop(0, 4, body)", 'NKI 0.6; say NKI_SINCE = "0.6"'),
    ("import nki.collectives as ncc", 'NKI 0.3; say NKI_SINCE = "0.3"'),
    ("from nki.collectives import ReplicaGroup", "nki.collectives came with NKI 0.3"),
    ("nisa.nc_matmul(dst=a, stationary=b, moving=c, accumulate=True)", "parameter accumulate"),
    ("nisa.tensor_copy(a, b)", "by keyword"),
    ("nisa.activate2(dst=a, data=b)", "nisa.activate2"),
    ("nisa.memset(dst=a, value=0.0, mask=m)", "parameter mask was removed"),
    ("d = {1: 2}", "dict keys"),
    ("class Config(dict): pass", "nl.NKIObject alone"),
    ("f = lambda x: x", "lambda"),
    ("while register: pass", "while"),
    ("try:\n    pass\nfinally:\n    pass", "try"),
    ("t = nl.ndarray((128, 4), nl.float32, 'sbuf')", "named by a string"),
    ("t = nl.zeros((128, 4), dtype=nl.float32, buffer='psum')", "nl.zeros: a buffer named by a"),
    ("t = nl.zeros((128, 4), dtype=nl.float32, buffer=nl.sbuf, address=0)", "parameter address"),
    ("t = nl.ndarray((128, 4), dtype=nl.float32)", "buffer has a default since 0.3 only"),
    ("nisa.dma_copy(dst=a, src=b, dge_mode=2)", "raw integer for an enum"),
    ("nisa.memset(dst=a, value=0.0, engine=1)", "write nisa.engine and its member"),
    ("nisa.dma_copy(dst=a, src=b, dst_rmw_op=nl.add)", "parameter dst_rmw_op"),
    ("nisa.iota(dst=a, pattern=[[1, 4]])", "parameter offset has a default since 0.3 only"),
    ("a = nisa.reciprocal(data=b)", "pass dst"),
    ("i = nl.program_id()", "nl.program_id: its arguments have defaults since 0.3 only"),
    ("e = nisa.dma_engine.dma", "nisa.dma_engine is not in every version"),
    ("import nki.isa as isa; isa.activate2(dst=a, data=b)", "nisa.activate2 is not in every"),
    ("import nki; nki.isa.tensor_copy(a, b)", "nisa.tensor_copy: pass operands by keyword"),
    ("import nki.language as lang; i = lang.arange(4)", "nl.arange is not in every version"),
    ("from nki.language import mgrid", "nl.mgrid is not in every version"),
    ("from nki.isa import memset; memset(dst=a, value=0.0, mask=m)", "parameter mask was removed"),
    ("from nki import jit; f = jit(mode='simulation')", "nki.jit: parameter mode was removed"),
    ("ncc.collective_permute_implicit(num_channels=2)", "parameter num_channels is not in every"),
    ("ncc.all_to_all_v(srcs=a)", "ncc.all_to_all_v is not in every version from 0.3"),
    ("s = {1, 2}", "sets"),
    ("s = {x for x in y}", "sets"),
    ("seed = 2147483648", "integers have 32 bits"),
    ("z = 1j", "NKI has no such values"),
    ("r = nisa.register_alloc(); t = a if r else b", "r: a number on the device has no value"),
    (
        "r, s = nisa.register_alloc(), nisa.register_alloc(); n = int(s)",
        "s: a number on the device",
    ),
    ("r = nisa.register_alloc(); x = r + 1", "r: a number on the device has no value"),
    ("r = nisa.register_alloc(); x = t[r : 4]", "r: a number on the device has no value"),
    ("me = ncc.rank_id(); x = me == 0", "me: a number on the device has no value"),
    ("for i in range(4) print(i)", "no Python"),
]

IN_FUNCTIONS = [
    ("@nki.jit\ndef f(a): return a\ndef g(a):\n    return f(a)", 5, "f: a kernel that a kernel"),
    ("@nki.jit(x=1)\ndef f(a): return a\ndef g(a):\n    f(a)", 5, "must not be decorated"),
    ("def turn(i):\n    return i\nnl.fori_loop(0, 4, turn)", 3, "nl.fori_loop returns nothing"),
    ("def turn(i):\n    x = a[2 * i]\nnl.fori_loop(0, 4, turn)", 3, "i: a number on the device"),
    ("def turn(i):\n    x = a[i, :]\nnl.fori_loop(0, 4, turn)", 3, "i: a number on the device"),
]


def test_our_kernels_have_no_findings() -> None:
    assert len(list(KERNELS.glob("*.py"))) >= 3
    assert check_folder(KERNELS) == []


@pytest.mark.parametrize(("source", "message"), PLANTED, ids=[s.split("\n")[0] for s, _ in PLANTED])
def test_a_planted_violation_is_caught_with_its_line(source: str, message: str) -> None:
    (finding,) = check_source(f"# line 1\n{source}\n", "kernel.py")
    assert message in finding.text
    assert str(finding).startswith("kernel.py:2: ")


@pytest.mark.parametrize(("source", "line", "message"), IN_FUNCTIONS, ids=lambda x: str(x)[:40])
def test_a_violation_across_functions_is_caught_with_its_line(
    source: str, line: int, message: str
) -> None:
    (finding,) = check_source(f'NKI_SINCE = "0.6"\n{source}\n', "kernel.py")
    assert message in finding.text
    assert finding.line == line


def test_enumerations_are_classes_that_nki_takes() -> None:
    assert check_source("from enum import Enum\nclass Mask(Enum):\n    full = 1\n") == []


def test_registers_as_addresses_and_ends_of_loops_are_no_findings() -> None:
    source = (
        'NKI_SINCE = "0.6"\nfrom nki.isa import nc_version\nr = nisa.register_alloc()\n'
        "nisa.register_load(dst=r, src=t)\n"
        "def turn(i):\n    nisa.dma_copy(dst=a, src=x.ap(pattern=[[1, 1]], scalar_offset=i))\n"
        "nl.fori_loop(0, r, turn)\n"
    )
    assert check_source(source) == []


def test_a_file_for_a_later_version_may_use_what_that_version_has() -> None:
    loop = "nl.fori_loop(0, 4, body)\nimport nki.collectives\n"
    assert check_source(f'NKI_SINCE = "0.6"\n{loop}') == []
    (finding,) = check_source(f'NKI_SINCE = "0.5"\n{loop}')
    assert "nl.fori_loop came with NKI 0.6" in finding.text
    (finding,) = check_source('NKI_SINCE = "0.6"\nfor i in nl.dynamic_range(4):\n    pass\n')
    assert "nl.dynamic_range" in finding.text
    declared = {path.stem for path in KERNELS.glob("*.py") if "NKI_SINCE" in path.read_text()}
    assert declared == {"loop_fwd", "loop_bwd", "ring_fwd", "ring_bwd", "ring_steps"}


def test_the_command_lists_findings_and_fails(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["doctor", "kernels"])
    assert good.exit_code == 0, good.output
    (tmp_path / "mine.py").write_text("if x is None: pass\n")
    bad = CliRunner().invoke(app, ["doctor", "kernels", str(tmp_path)])
    assert bad.exit_code == 1
    assert "mine.py:1:" in bad.output


def test_a_folder_without_kernels_is_refused(tmp_path: Path) -> None:
    empty = CliRunner().invoke(app, ["doctor", "kernels", str(tmp_path)])
    assert empty.exit_code == 2
    assert "no Python file" in empty.output


@pytest.fixture
def _no_slice_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """NKI 0.2 cannot slice a slice; the text of a kernel does not show it, its run does."""
    right = NkiTensor.__getitem__

    def whole_tensors_only(self: NkiTensor, key: object) -> NkiTensor:
        whole = self.storage.partitions * self.storage.row_bytes
        assert self.size * self.dtype.itemsize == whole, f"a slice of a slice: {self.shape}"
        return right(self, key)

    monkeypatch.setattr(NkiTensor, "__getitem__", whole_tensors_only)


@pytest.mark.usefixtures("_no_slice_of_a_slice")
@pytest.mark.parametrize("mask", ["full", "causal", "strict", "interval"])
@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
def test_our_kernels_never_slice_a_slice(generation: str, mask: str) -> None:
    package = load("nxd_cp.kernels", generation=generation)
    x, row = np.zeros((2, 2, 200, 160), np.float32), np.zeros((2, 2, 200, 1), np.float32)
    bounds = tuple(np.full((2, 200, 1), value, np.float32) for value in (0, 100, 0, 100))
    bounds = bounds if mask == "interval" else ()
    options = {"softcap": 20.0, "bounds": bounds}
    carry = x, np.ones((2, 2, 200, 2), np.float32)
    o, lse, _ = package.flash_fwd.flash_fwd(x, x, x, mask, 1.0, carry=carry, **options)
    again = package.flash_fwd.flash_fwd(x, x, x, mask, 1.0, shift="none", bounds=bounds)
    options["bounds"] = bounds[:2]
    dq, _, _ = package.flash_bwd.flash_bwd(
        x, x, x, x, lse, row, mask, 1.0, carry=(x, x, x), **options
    )
    assert o.shape == again[0].shape == dq.shape == x.shape


@pytest.mark.usefixtures("_no_slice_of_a_slice")
@pytest.mark.parametrize("generation", ["gen2", "gen3", "gen4"])
def test_our_support_kernels_never_slice_a_slice(generation: str) -> None:
    package = load("nxd_cp.kernels", generation=generation)
    x, row = np.ones((2, 2, 200, 160), np.float32), np.zeros((2, 2, 200, 1), np.float32)
    delta = package.row_delta.row_delta(x, x)
    o, lse = package.merge.merge(x, row, x, row)
    runs = ((0, 100, 2), (1, 100, 2))
    again = package.permute.permute_tokens(o[0], runs, inverse=True)
    assert delta.shape == lse.shape == row.shape
    assert again.shape == x[0].shape


@pytest.mark.usefixtures("_no_slice_of_a_slice")
def test_a_slice_of_a_slice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    package = load("nxd_cp.kernels", generation="gen3")
    right = package.flash_fwd.load_rows

    def planted(place: dict[str, NkiTensor], b: int, h: int) -> NkiTensor:
        place["hbm"][b, h, :, :][0:128, :]
        return right(place, b, h)

    monkeypatch.setattr(package.flash_fwd, "load_rows", planted)
    x = np.zeros((1, 2, 128, 64), np.float32)
    with pytest.raises(AssertionError, match="a slice of a slice"):
        package.flash_fwd.flash_fwd(x, x, x, "full", 1.0)
