"""Every page works: its blocks run, its links lead to files, its pictures are the drawn ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import ROOT, run_bash, run_python, snippets, write_files

DOCS = ROOT / "docs"
PAGES = (
    "attention.md",
    "concepts.md",
    "hugging_face.md",
    "torchtitan.md",
    "traces.md",
    "strategies.md",
    "inference.md",
    "kernels/index.md",
    "kernels/flash_fwd.md",
    "kernels/flash_bwd.md",
    "kernels/loops.md",
    "kernels/ring.md",
    "kernels/support.md",
)
_BLOCK = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name, tmp_path):
    page = DOCS / name
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_files(page, tmp_path)
    run_python(page)
    for block in snippets(page, "bash"):
        run_bash(block, tmp_path)


def test_a_page_with_blocks_is_run_by_some_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    pages = [page.name for page in DOCS.rglob("*.md") if snippets(page, "python", "bash")]
    assert [name for name in pages if name not in tests] == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files(page):
    targets = _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("name", "pages"),
    [("concepts", ("concepts.md", "traces.md")), ("kernels", ("kernels/*.md",))],
)
def test_the_pictures_of_the_pages_are_those_that_the_script_draws(name, pages, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / f"draw_{name}.py"), str(tmp_path)]
    subprocess.run(script, check=True, env={"PYTHONPATH": str(ROOT)}, timeout=100)
    drawn = {path.name for path in tmp_path.iterdir()}
    text = "".join(page.read_text() for pattern in pages for page in DOCS.glob(pattern))
    shown = set(re.findall(rf"images/({name}_\w+\.png)", text))
    assert drawn == shown
