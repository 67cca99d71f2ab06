"""The pytest plugin for other people's kernels, and the page that explains it, run as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nxd_cp.simulators.nki_api import loading

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "testing_your_kernels.md").read_text(encoding="utf-8")
WORKFLOW = (ROOT / "docs" / "examples" / "nki-kernels-ci.yml").read_text(encoding="utf-8")
PLUGIN = "nxd_cp.simulators.pytest_plugin"
SNIPPETS = re.findall(r"```(?:python|ini)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def page(pytester, monkeypatch):
    """A folder with the page's files; returns how to run pytest in it."""
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    for name, text in SNIPPETS:
        pytester.path.joinpath(name).write_text(text, encoding="utf-8")

    def run(*options):
        plugins = ("-p", PLUGIN, "-p", "no:cacheprovider", "-p", "no:nki-simulator")
        return pytester.runpytest_inprocess(*plugins, *options)

    return run


def test_the_page_has_a_kernel_a_test_and_a_setting():
    assert [name for name, _ in SNIPPETS] == ["my_kernels.py", "test_my_kernels.py", "pytest.ini"]


def test_the_pages_example_does_what_the_page_says(page):
    result = page("-v")
    result.assert_outcomes(passed=9)
    result.stdout.fnmatch_lines(
        ["nki: simulated, not timed (gen2, gen3, gen4; default checks)", "*test_scale?gen2?*"]
    )


@pytest.mark.parametrize("options", re.findall(r"^ +- (--nki.*)$", WORKFLOW, flags=re.MULTILINE))
def test_the_workflows_options_work(page, options):
    (command,) = re.findall(r"run: pytest (.*)", WORKFLOW)
    words = shlex.split(command.replace("${{ matrix.options }}", options))
    outcome = page(*words).parseoutcomes()
    assert outcome["passed"] == (3 if "trn1" in options else 4)
    assert "failed" not in outcome


def test_a_wrong_kernel_fails_its_test_and_names_the_line(page, pytester):
    pytester.makepyfile(
        test_my_kernels="""
        import numpy as np
        from my_kernels import forgets_to_load, scale

        def test_direct():
            forgets_to_load(np.ones((128, 8), np.float32))

        def test_rejects_nothing(nki_simulator):
            with nki_simulator.rejects("memory.capacity"):
                nki_simulator.run(scale, np.ones((128, 8), np.float32), 2.0)

        def test_rejects_another_rule(nki_simulator):
            with nki_simulator.rejects("memory.capacity"):
                nki_simulator.run(forgets_to_load, np.ones((128, 8), np.float32))
        """
    )
    result = page("--nki-generation", "trn2")
    result.assert_outcomes(failed=3)
    text = result.stdout.str()
    assert "rule memory.uninitialised" in text
    assert "my_kernels.py:21: nisa.activation(dst=out, op=nl.exp, data=tile)" in text
    assert "expected the kernel to break rule memory.capacity; it broke none" in text


def test_ranks_strict_and_shape_only(page, pytester):
    pytester.makepyfile(
        test_my_kernels="""
        import numpy as np
        from my_kernels import scale

        def test_ranks(nki_simulator):
            inputs = [(np.full((128, 8), r, np.float32), 2.0) for r in range(2)]
            outputs = nki_simulator.run_ranks(scale, inputs)
            assert [o[0, 0] for o in outputs] == [0.0, 2.0]

        def test_params(nki_simulator):
            assert nki_simulator.params.strict
        """
    )
    page("--nki-generation", "trn2", "--nki-strict").assert_outcomes(passed=2)
    result = page("--nki-generation", "trn2", "--nki-strict", "--nki-shape-only")
    result.assert_outcomes(passed=1, failed=1)


def test_switched_off_nki_stays_what_it_was(page, pytester):
    (pytester.path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    pytester.makepyfile(
        test_my_kernels="""
        import pytest

        def test_absent():
            with pytest.raises(ImportError):
                import nki.language
        """
    )
    page().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "real", "words"),
    [
        (
            ["--nki-simulator", "--nki-generation", "gen9"],
            False,
            "expected a NeuronCore generation",
        ),
        (["--nki-simulator"], True, "a real nki is installed"),
    ],
)
def test_bad_settings_stop_pytest_with_the_reason(page, monkeypatch, options, real, words):
    monkeypatch.setattr(loading, "real_nki_present", lambda: real)
    result = page(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in result.stderr.str()


def test_an_installation_without_the_simulators_packages_keeps_its_pytest():
    code = f"""
import sys
sys.modules["ml_dtypes"] = None
import pytest
import {PLUGIN}
sys.exit(pytest.main(["--version", "-p", "{PLUGIN}"]))
"""
    # Installed or not: the entry point would register the plugin a second time.
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(source):
        command = [sys.executable, "-c", source]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    done = run(code)
    assert done.returncode == 0, done.stderr
    done = run(code.replace('["--version"', '["--nki-simulator", "--collect-only"'))
    assert "install nxd-cp[sim]" in done.stderr


def test_the_plugin_is_an_entry_point():
    assert f'"pytest11": ["nki-simulator = {PLUGIN}"]' in (ROOT / "setup.py").read_text()
