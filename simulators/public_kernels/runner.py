"""Runs public kernels in child processes, one after another, with a bar and a file of outcomes.

A kernel whose child dies without a word, or gives no row, is a failed kernel: never a silent
gap. Interrupting is safe: what has ended is in the file.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import outcomes
from .catalogue import Kernel
from .child import Limits, command, environment
from .outcomes import FAILED, Outcome

NO_TESTS = 5  # pytest's exit status when every row was left out, as when all are done


def run_kernel(
    kernel: Kernel, clone: Path, file: Path, generation: str, limits: Limits, progress: Progress
) -> None:
    """Run the rows of one kernel that are not done yet; their outcomes are in `file`."""
    task = progress.add_task(kernel.name, total=None)
    file.parent.mkdir(parents=True, exist_ok=True)
    before = _lines(file)
    with tempfile.TemporaryDirectory(prefix="public_kernels_") as folder:
        said = Path(folder) / "child.txt"
        with said.open("w", encoding="utf-8") as out:
            child = subprocess.Popen(
                command(kernel, clone, file.resolve(), generation, limits),
                cwd=folder,
                env=environment(kernel, clone, generation, limits),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                while child.poll() is None:
                    progress.update(task, completed=_lines(file) - before)
                    time.sleep(0.2)
            finally:
                child.kill()
                child.wait()
        text = said.read_text(encoding="utf-8", errors="replace")
    rows = _lines(file) - before
    done = outcomes.finished(file, kernel.name)
    if rows == 0 and not (done and child.returncode in (0, NO_TESTS)):
        last = text.strip().splitlines()[-1:] or ["nothing printed"]
        reason = f"no row ran; the child ended with {child.returncode}: {last[0]}"
        outcomes.append(file, Outcome(kernel.name, "(child process)", FAILED, reason))
    elif child.returncode < 0:
        reason = f"the child was killed by signal {-child.returncode}"
        outcomes.append(file, Outcome(kernel.name, "(child process)", FAILED, reason))
    progress.update(task, completed=rows, total=max(rows, 1))


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def run(
    kernels: Sequence[Kernel],
    clones: dict[str, Path],
    file: Path,
    generation: str,
    limits: Limits,
    *,
    quiet: bool = False,
) -> list[Outcome]:
    """Run `kernels` from `clones`; the outcomes of these kernels, also those of earlier runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), disable=quiet) as progress:
        whole = progress.add_task("kernels", total=len(kernels))
        for kernel in kernels:
            run_kernel(kernel, clones[kernel.clone], file, generation, limits, progress)
            progress.advance(whole)
    names = {kernel.name for kernel in kernels}
    return [outcome for outcome in outcomes.read(file).values() if outcome.kernel in names]
