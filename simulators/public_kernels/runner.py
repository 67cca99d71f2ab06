"""Runs public kernels in child processes, one after another, with a bar and a file of outcomes.

A kernel whose child dies without a word, or gives no row, is a failed kernel: never a silent
gap. Interrupting is safe: what has ended is in the file.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import outcomes
from .catalogue import Kernel
from .child import Limits, command, environment
from .outcomes import FAILED, SKIPPED, Outcome

NO_TESTS = 5  # pytest's exit status when every row was left out, as when all are done


def run_kernel(
    kernel: Kernel, clone: Path, file: Path, generation: str, limits: Limits, progress: Progress
) -> None:
    """Run the rows of one kernel that are not done yet; their outcomes are in `file`."""
    task = progress.add_task(kernel.name, total=None)
    file.parent.mkdir(parents=True, exist_ok=True)
    before, known = _lines(file), set(outcomes.read(file).values())
    status, last, left, go_on = outcomes.GO_ON, "", limits, False
    while status == outcomes.GO_ON:
        status, last = _run_child(
            command(kernel, clone, file.resolve(), generation, left, go_on=go_on),
            environment(kernel, clone, generation, limits),
            lambda: progress.update(task, completed=_lines(file) - before),
        )
        go_on = True
        now = set(outcomes.read(file).values()) - known
        spent = sum(o.seconds for o in now if o.kernel == kernel.name)
        if limits.seconds and spent > limits.seconds:
            break
        left = replace(limits, seconds=limits.seconds and limits.seconds - spent)
    rows = _lines(file) - before
    done = outcomes.finished(file, kernel.name)
    if rows == 0 and status == NO_TESTS and kernel.may_be_empty and not done:
        reason = "no tests in this file for this generation"
        outcomes.append(file, Outcome(kernel.name, "(child process)", SKIPPED, reason))
    elif rows == 0 and not (done and status in (0, NO_TESTS)):
        reason = f"no row ran; the child ended with {status}: {last}"
        outcomes.append(file, Outcome(kernel.name, "(child process)", FAILED, reason))
    elif status < 0:
        reason = f"the child was killed by signal {-status}"
        outcomes.append(file, Outcome(kernel.name, "(child process)", FAILED, reason))
    progress.update(task, completed=rows, total=max(rows, 1))


def _run_child(
    words: list[str], variables: dict[str, str], tick: Callable[[], None]
) -> tuple[int, str]:
    """Run one child in a scratch folder: (exit status, the last line that it printed)."""
    with tempfile.TemporaryDirectory(prefix="public_kernels_") as folder:
        said = Path(folder) / "child.txt"
        with said.open("w", encoding="utf-8") as out:
            child = subprocess.Popen(
                words, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT
            )
            try:
                while child.poll() is None:
                    tick()
                    time.sleep(0.2)
            finally:
                child.kill()
                child.wait()
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return child.returncode, lines[-1] if lines else "nothing printed"


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
