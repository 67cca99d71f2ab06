"""Other people's kernels: rows, table, exit status, resuming, and what goes wrong.

The clones here are stand-ins with our own kernels; the real ones run where a path is given.
"""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import public_clone
import pytest

from nxd_cp.simulators.nki_api import simulate
from nxd_cp.simulators.public_kernels import outcomes
from nxd_cp.simulators.public_kernels.catalogue import clones_in, library_suite
from nxd_cp.simulators.public_kernels.cli import main
from nxd_cp.simulators.public_kernels.frameworks import Group
from nxd_cp.simulators.public_kernels.library.repair import without_repeated_docstring_end
from nxd_cp.simulators.public_kernels.library.spread import cost, sample, spread
from nxd_cp.simulators.public_kernels.outcomes import Outcome
from nxd_cp.simulators.public_kernels.scripts import SCRIPTS
from nxd_cp.simulators.public_kernels.scripts import run as run_script

pytestmark = pytest.mark.timeout(600)  # child processes, on a machine that may be busy
BROKEN = ("rope", "mlp_cte", "qkv_cte")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return public_clone.library(tmp_path_factory.mktemp("clones") / "nki-library")


def run(*arguments):
    """(exit status, what was printed) of the command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*map(str, arguments), "--quiet"])
    return status, printed.getvalue()


def chosen(*kernels):
    return [word for kernel in kernels for word in ("--kernel", kernel)]


def rows(folder):
    """The outcomes in the default run's file."""
    return outcomes.read(folder / "default_gen3.jsonl")


@pytest.fixture(scope="module")
def everything(library, tmp_path_factory):
    """All kernels of the library, once: (exit status, what was printed, outcomes)."""
    folder = tmp_path_factory.mktemp("results")
    before = sorted(library.rglob("*"))
    status, text = run(
        library, "--row-seconds", "2", "--results", folder, *chosen("cumsum", *BROKEN)
    )
    assert sorted(library.rglob("*")) == before, "the clone was touched"
    return status, text, rows(folder)


def test_rows_of_the_librarys_own_tests_pass_on_one_rank_and_on_two(everything):
    found = [o for (kernel, _), o in everything[2].items() if kernel == "cumsum"]
    assert [o.status for o in found].count("passed") == 7
    assert [o.reason for o in found if o.status == "skipped"] == ["not on this chip"]
    assert any("test_ranks" in o.row for o in found)


def test_failures_are_in_the_table_with_reasons_and_in_the_exit_status(everything):
    status, text, all_rows = everything
    found = {
        row.rpartition("::")[2]: o for (kernel, row), o in all_rows.items() if kernel == "rope"
    }
    assert found["test_wrong_reference"].reason.startswith("AssertionError")
    assert "memory.uninitialised" in found["test_broken_rule"].reason
    assert "kernels.py" in found["test_broken_rule"].reason
    assert (found["test_newer_chip"].status, found["test_newer_chip"].reason) == (
        "skipped",
        "not for this chip: nki.isa.exponential: needs gen4, this is gen3",
    )
    assert (found["test_slow"].status, found["test_slow"].reason) == ("skipped", "longer than 2 s")
    assert (found["test_large"].status, found["test_large"].reason) == (
        "skipped",
        "needs more than 8 GB",
    )
    assert status == 1
    assert "7 passed, 4 failed, 5 skipped" in text


@pytest.mark.parametrize(
    ("kernel", "reason"), [("mlp_cte", "no_such_module"), ("qkv_cte", "ended with 7")]
)
def test_a_file_that_does_not_import_and_a_process_that_dies_are_failures(
    everything, kernel, reason
):
    (outcome,) = [o for (of, _), o in everything[2].items() if of == kernel]
    assert outcome.status == "failed"
    assert reason in outcome.reason


def test_expected_times_are_nowhere(everything):
    names = [row for kernel, row in everything[2] if "timed" in row]
    assert [name.rpartition("::")[2] for name in names] == ["test_timed[8-float32]"]
    assert "987654" not in everything[1]


def test_a_run_that_was_cut_off_goes_on_and_failed_rows_run_again(library, tmp_path):
    file = tmp_path / "default_gen3.jsonl"
    first = "integration/nkilib/core/cumsum/test_cumsum.py::test_double"
    for width, status in ((8, "passed"), (32, "failed")):
        outcomes.append(file, Outcome("cumsum", f"{first}[{width}]", status, "", 99.0))
    with file.open("a") as unfinished:
        unfinished.write('{"kernel": "cumsum", "row": "half a li\n')
    status, _ = run(library, "--results", tmp_path, *chosen("cumsum"))
    found = rows(tmp_path)
    assert status == 0
    assert found["cumsum", f"{first}[8]"].seconds == 99.0
    assert found["cumsum", f"{first}[32]"].status == "passed"
    assert found["cumsum", f"{first}[32]"].seconds < 99.0


def test_the_default_run_takes_at_most_so_many_rows_and_replaces_skipped_ones(library, tmp_path):
    options = ("--rows", "3", "--generation", "trn1", "--results", tmp_path)
    run(library, *options, *chosen("cumsum"))
    found = outcomes.read(tmp_path / "default_gen2.jsonl").values()
    assert [o.status for o in found].count("passed") == 3
    assert "asks for 2 cores per rank; gen2 has 1" in {o.reason for o in found}


def test_the_suite_is_every_test_file_and_one_without_tests_is_no_failure(library, tmp_path):
    names = [kernel.name for kernel in library_suite(library)]
    assert names == [
        "core/attention/test_attention_tkg.py",
        "core/cumsum/test_cumsum.py",
        "core/embeddings/test_rope.py",
        "core/mlp/test_mlp_cte.py",
        "core/qkv/test_configs.py",
        "core/qkv/test_qkv_cte.py",
    ]
    words = ("--suite", "--rows", "1", "--results", tmp_path)
    _, text = run(library, *words, *chosen(names[1], names[4]))
    assert "1 passed, 0 failed, 1 skipped; 1 of 8 rows ran" in " ".join(text.split())


def test_a_tolerated_rule_warns_and_a_failure_names_the_warning_that_explains_it(library, tmp_path):
    words = ("--suite", "--results", tmp_path, *chosen("core/attention/test_attention_tkg.py"))
    status, text = run(library, *words)
    found = outcomes.read(tmp_path / "suite_gen3.jsonl")
    ends = {row.rpartition("::")[2]: o for (_, row), o in found.items()}
    assert {name: o.status for name, o in ends.items()} == {
        **{f"test_halves[{width}]": "passed" for width in (8, 16, 32)},
        "test_overwritten": "failed",
    }
    reason = ends["test_overwritten"].reason
    assert "the simulator warned: memory.overwritten" in reason
    assert "kernels.py" in reason
    assert "nl.add(first, second)" in reason
    assert status == 1
    assert "tolerates" in text
    assert "3 passed, 1 failed, 0 skipped; 4 of 4 rows ran" in " ".join(text.split())


def test_a_sample_of_the_suite_is_drawn_with_a_seed_and_says_of_how_many(library, tmp_path):
    words = ("--suite", "--rows", "2", *chosen("core/cumsum/test_cumsum.py"))

    def drawn(name, seed):
        _, text = run(library, *words, "--results", tmp_path / name, "--seed", seed)
        assert "2 of 8 rows ran" in " ".join(text.split())
        return set(outcomes.read(tmp_path / name / "suite_gen3.jsonl"))

    assert drawn("a", 1) == drawn("b", 1)


def test_a_fresh_run_forgets_what_was_kept(library, tmp_path):
    words = ("--rows", "1", "--results", tmp_path, *chosen("cumsum"))
    run(library, *words)
    outcomes.append(tmp_path / "default_gen3.jsonl", Outcome("cumsum", "other", "failed"))
    assert run(library, *words)[0] == 1
    assert run(library, *words, "--fresh")[0] == 0


def test_scripts_run_as_published_alone_and_on_many_ranks(tmp_path):
    public_clone.documentation(tmp_path / "sdk")
    public_clone.samples(tmp_path / "samples")
    names = (
        "docs: getting started, torch",
        "docs: layout violation",
        "samples: all-gather matmul ring",
    )
    status, _ = run(tmp_path, "--results", tmp_path / "out", *chosen(*names))
    found = {kernel: o for (kernel, _), o in rows(tmp_path / "out").items()}
    assert status == 1
    assert [found[name].status for name in names] == ["passed", "failed", "passed"], found
    assert "it was accepted" in found[names[1]].reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("docs: layout, dynamic loop", "does not parse as published: line 1"),
        ("docs: layout", "this clone has no layout-pass.py"),
        ("samples: mamba, torch", "written for neuronxcc.nki"),
    ],
)
def test_scripts_that_cannot_run_are_skipped_with_the_reason(tmp_path, name, reason):
    public_clone.documentation(tmp_path)
    public_clone.samples(tmp_path)
    script = next(script for script in SCRIPTS if script.name == name)
    outcome = run_script(script, tmp_path / script.path, 0)
    assert outcome.status == "skipped"
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "expected the folder of a clone"),
        (["."], "expected a clone of nki-library"),
        (["{library}", "--kernel", "nothing"], "expected --kernel of"),
        (["{library}", "--generation", "gen9"], "expected a NeuronCore generation"),
    ],
)
def test_bad_arguments_say_what_was_expected(library, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    places = {"nowhere": tmp_path / "nowhere", ".": tmp_path / "empty", "{library}": library}
    with pytest.raises(SystemExit) as ended:
        main([str(places.get(a, a)) for a in arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_script_is_the_command(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "run_public_kernels.py"
    command = [sys.executable, str(script), str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected the folder of a clone" in done.stderr


def test_clones_are_found_at_a_path_and_one_folder_below(tmp_path):
    library = public_clone.library(tmp_path / "a" / "nki-library")
    samples = public_clone.samples(tmp_path / "a" / "nki-samples")
    assert clones_in([tmp_path / "a"]) == {"nki-library": library, "nki-samples": samples}
    assert clones_in([samples]) == {"nki-samples": samples}


def test_a_rank_that_ends_while_others_wait_is_an_error_and_no_hang():
    group = Group(2)

    def unequal(rank):
        if rank == 0:
            group.call(simulate(lambda: None), (), {})

    with pytest.raises(RuntimeError, match=r"rank 0 waits in .*; rank 1 has ended"):
        group.run(unequal, ())


class Item:
    """A pytest item, as far as `spread` looks at it."""

    def __init__(self, nodeid, skipped=False):
        self.nodeid, self.skipped = nodeid, skipped

    def get_closest_marker(self, name):
        return self.skipped or None


def test_the_spread_is_cheap_rows_from_everywhere_and_skipped_rows_last():
    items = [Item(f"t.py::test[{n}]", skipped=n == 3) for n in range(1, 101)]
    order = [cost(item.nodeid) for item in spread(items, 5)]
    assert sorted(order) == list(range(1, 101))
    assert order[:5] == [1, 6, 11, 16, 21]
    assert order[-1] == 3


def test_a_sample_is_every_row_in_the_order_of_its_seed_and_skipped_rows_last():
    items = [Item(f"t.py::test[{n}]", skipped=n == 3) for n in range(1, 101)]
    drawn = sample(items, "1")
    assert drawn == sample(items, "1")
    assert drawn != sample(items, "2")
    assert sorted(drawn, key=items.index) == items
    assert drawn[-1] is items[2]


def test_only_a_repeated_docstring_end_is_repaired():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n\n    Two.\n    """\n    return 1\n'
    fixed, first, last = without_repeated_docstring_end(source)
    assert (first, last) == (6, 8)
    assert fixed.count("\n") == source.count("\n")
    names = {}
    exec(compile(fixed, "fixed", "exec"), names)
    assert names["f"]() == 1
    assert without_repeated_docstring_end(source.replace('Two.\n    """\n    return', "X")) is None


def test_an_outcome_is_one_line_of_json():
    outcome = Outcome("k", "r", "failed", "two\nlines", 1.5)
    assert "\n" not in outcome.line()
    assert Outcome(**json.loads(outcome.line())) == outcome
