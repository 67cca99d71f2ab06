"""Run the fenced code blocks of a documentation page, so that no page shows what does not work.

Does: find the blocks, run Python in one namespace per page, run bash in a folder where `python`,
`nxd-cp`, `nki-sim`, `pytest` and `torchrun` are those of this test run. Does not: judge output.

    ```python                runs
    ```python                with `# file: x.py` in line 1: written to the folder, for bash
    ```bash                  runs
    ```text                  is shown only (printed output, commands that need a device)

Any other kind of block is refused, so that none is left out by a slip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LANGUAGES = ("python", "bash", "text", "json", "yaml", "ini")
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```\s*$", flags=re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# file: (\S+)\n")
_SHIMS = {
    "python": "",
    "python3": "",
    "nxd-cp": "-m nxd_cp.cli",
    "nki-sim": "-m nxd_cp.simulators.nki_api.cli",
    "pytest": "-m pytest",
    "torchrun": "-m torch.distributed.run",
}


@dataclass(frozen=True)
class Snippet:
    """One fenced block. line: of its first line of code in the page, counted from 1."""

    page: Path
    language: str
    line: int
    text: str

    @property
    def file_name(self) -> str | None:
        """The name of the file that this block is, or None."""
        found = _FILE.match(self.text)
        return found.group(1) if found else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets(page: Path, *languages: str) -> list[Snippet]:
    """The blocks of a page in order, of all languages or of those named.

    Raises ValueError for a block of a language that is not in `LANGUAGES`.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        if match.group(1) not in LANGUAGES:
            raise ValueError(
                f"{page.name}:{line}: expected a block of {', '.join(LANGUAGES)}, "
                f"got {match.group(1)!r}"
            )
        found.append(Snippet(page, match.group(1), line, match.group(2)))
    return [one for one in found if not languages or one.language in languages]


def run_python(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the page's Python blocks from top to bottom in one namespace, which is returned.

    Blocks that are files are left out. names: what the page supposes that its reader has.
    Errors show the page and its line.
    """
    names = {"__name__": page.stem} if names is None else names
    for one in snippets(page, "python"):
        if one.file_name is None:
            code = compile("\n" * (one.line - 1) + one.text, str(page), "exec")
            exec(code, names)
    return names


def write_files(page: Path, folder: Path) -> list[Path]:
    """Write the page's blocks that are files to `folder`."""
    written = []
    for one in snippets(page):
        if one.file_name is not None:
            written.append(folder / one.file_name)
            written[-1].write_text(one.text, encoding="utf-8")
    return written


def start_bash(
    snippet: Snippet, folder: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a bash block in `folder`; what it prints, errors too, is in its stdout."""
    bin_folder = folder / ".snippet-bin"
    bin_folder.mkdir(exist_ok=True)
    for name, arguments in _SHIMS.items():
        shim = bin_folder / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        shim.chmod(0o755)
    path = os.pathsep.join((str(bin_folder), os.environ.get("PATH", "")))
    python_path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", snippet.text],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": python_path, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_bash(
    snippet: Snippet,
    folder: Path,
    env: dict[str, str] | None = None,
    *,
    expected_status: int = 0,
    timeout_s: float = 100.0,
) -> str:
    """Run a bash block to its end; returns what it printed.

    Raises AssertionError, with the page, the line and the output, for another exit status.
    """
    process = start_bash(snippet, folder, env)
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == expected_status, (
        f"{snippet} ended with status {process.returncode}, expected {expected_status}:\n"
        f"{snippet.text}\n{printed}"
    )
    return printed
