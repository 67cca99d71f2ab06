"""The runner of documentation snippets runs every block, and shows where one fails."""

import traceback
from pathlib import Path

import pytest
from snippets import run_bash, run_python, snippets, write_files

PAGE = """# A page

```python
x = 2
```

Text between.

```python
# file: double.py
import sys
print(2 * int(sys.argv[1]))
```

```bash
python double.py 21
nxd-cp plan --ranks 2
```

```text
shown only
```

```python
y = x + 1
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_with_language_and_line(page: Path) -> None:
    found = [(one.language, one.line) for one in snippets(page)]
    assert found == [("python", 4), ("python", 10), ("bash", 16), ("text", 21), ("python", 25)]
    assert str(snippets(page, "bash")[0]) == "page.md:16"


def test_python_blocks_share_a_namespace_and_files_are_not_run(page: Path) -> None:
    assert run_python(page)["y"] == 3
    assert run_python(page, {"given": 1})["given"] == 1


def test_bash_runs_the_files_and_commands_of_this_test_run(page: Path, tmp_path: Path) -> None:
    assert [path.name for path in write_files(page, tmp_path)] == ["double.py"]
    printed = run_bash(snippets(page, "bash")[0], tmp_path)
    assert printed.startswith("42\n")
    assert "zigzag" in printed


def test_a_failing_python_block_is_caught_with_its_line(page: Path) -> None:
    page.write_text(PAGE.replace("y = x + 1", "y = unknown"))
    with pytest.raises(NameError, match="unknown") as caught:
        run_python(page)
    assert traceback.extract_tb(caught.tb)[-1].lineno == 25


@pytest.mark.parametrize("wrong", ["python double.py x", "echo $UNSET", "false | true"])
def test_a_failing_bash_block_is_caught(page: Path, tmp_path: Path, wrong: str) -> None:
    page.write_text(PAGE.replace("python double.py 21", wrong))
    write_files(page, tmp_path)
    with pytest.raises(AssertionError, match=r"page.md:16 ended with status"):
        run_bash(snippets(page, "bash")[0], tmp_path)


@pytest.mark.parametrize("fence", ["```", "```pyhton", "```sh"])
def test_a_block_of_no_known_language_is_caught(page: Path, fence: str) -> None:
    page.write_text(PAGE + f"\n{fence}\n1\n```\n")
    with pytest.raises(ValueError, match=r"page.md:29: expected a block of python, bash"):
        snippets(page)
