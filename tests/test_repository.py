"""What the repository says of itself is true: README tree, snippets, names; plain text; scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE_SUFFIXES = {".py", ".sh", ".toml", ".md", ".yml", ".yaml", ".txt", ".cfg"}
# Written in pieces so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]", "/tm" + "p/"))
)


def _files() -> list[Path]:
    """Tracked text files; without git, all that are not hidden."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        paths = [ROOT / line for line in done.stdout.splitlines()]
    else:
        hidden = re.compile(r"(^|/)\.")
        paths = [p for p in ROOT.rglob("*") if not hidden.search(str(p.relative_to(ROOT)))]
    return [p for p in paths if p.is_file() and p.suffix in SOURCE_SUFFIXES]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _folders_in_tree(tree: str) -> set[str]:
    folders, parents = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        folders.add("/".join(parents))
    return folders


def _folders_on_disk() -> set[str]:
    """Top folders with sources, and the sub-packages directly below."""
    folders = set()
    for path in _files():
        parts = path.relative_to(ROOT).parts[:-1]
        if parts and not parts[0].startswith("."):
            folders |= {parts[0], "/".join(parts[:2])}
    return folders


def test_readme_tree_is_the_folders_on_disk():
    (tree,) = _blocks("text")
    assert _folders_in_tree(tree) == _folders_on_disk()


def test_a_missing_folder_in_the_tree_is_caught():
    (tree,) = _blocks("text")
    without_demo = "\n".join(line for line in tree.splitlines() if "demo/" not in line.split()[0])
    assert _folders_in_tree(without_demo) != _folders_on_disk()


def test_readme_names_only_files_that_exist():
    named = re.findall(r"`(?:bash |python |pytest )?([\w./]+\.(?:py|sh|txt))`", README)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


def test_first_readme_snippet_runs():
    exec(compile(_blocks("python")[0], "README.md", "exec"), {})


def test_training_step_of_the_readme_runs():
    names: dict = {}
    exec(compile(_blocks("python")[1], "README.md", "exec"), names)
    tokens = torch.arange(16).reshape(2, 8)
    weights = torch.linspace(-1, 1, 16 * 16).reshape(16, 16)

    class Model(torch.nn.Module):
        def __init__(self, cp):
            super().__init__()
            self.cp = cp
            self.table = torch.nn.Parameter(weights.clone())

        def forward(self, input_ids, position_ids):
            x = self.table[input_ids][:, None]
            return names["ring_attention"](x, x, x, cp=self.cp)[:, 0]

    def on_each_rank(cp):
        batch = {"input_ids": tokens, "labels": tokens}
        model = Model(cp)
        return names["training_step"](model, batch, cp), model.table.grad

    ((one, grad_one),) = names["CPContext"].local(1).run(on_each_rank)
    for loss, grad in names["CPContext"].local(2).run(on_each_rank):
        torch.testing.assert_close(loss, one)
        torch.testing.assert_close(grad, grad_one)


SCRIPTS = sorted(set((ROOT / "scripts").glob("*.py")) - {ROOT / "scripts" / "this_clone.py"})


def _finds_package(script: str) -> bool:
    """By `this_clone`, or as `bench_memory.py` by another script."""
    others = [path.stem for path in SCRIPTS]
    return re.search(rf"^(import this_clone|from ({'|'.join(others)}) )", script, re.M) is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_find_the_package_in_one_way(path):
    text = path.read_text(encoding="utf-8")
    assert _finds_package(text)
    assert "PYTHONPATH" not in text
    assert "sys.path.insert(0, str(Path(__file__)" not in text


def test_a_script_that_needs_an_installed_package_is_caught():
    assert not _finds_package("import sys\n\nfrom nxd_cp.cli import app\n")


def test_scripts_import_the_package_and_test_helpers_of_their_clone(tmp_path):
    code = "import this_clone, nxd_cp, budgets; print(nxd_cp.__file__, budgets.__file__)"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); {code}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = [ROOT / "nxd_cp" / "__init__.py", ROOT / "tests" / "budgets.py"]
    assert [Path(name) for name in done.stdout.split()] == expected


def _offences(text: str) -> list[str]:
    found = [f"non-ASCII {c!r}" for c in text if not c.isascii()]
    return found + [f"machine path {m}" for m in MACHINE_PATHS.findall(text)]


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_ascii_and_name_no_machine(path):
    assert _offences(path.read_text(encoding="utf-8")) == []


def test_a_machine_path_and_an_accent_are_caught():
    assert _offences("cd /ro" + "ot/clone") == ["machine path /ro" + "ot/"]
    assert _offences("caf" + chr(233)) == [f"non-ASCII {chr(233)!r}"]
