"""Scripts of the documentation and of nki-samples: one row each, run as the user would run them.

    python -m nxd_cp.simulators.public_kernels.scripts SCRIPT NAME FILE SECONDS

A script passes when it ends without an exception, does not print that results differ, and its
check (see checks.py), where it has one, holds. A script that the documentation shows as wrong
passes when the simulator rejects it. Appends the outcome to FILE. Meant for a child process.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxd_cp.simulators.nki_api import NkiValidationError, install

from . import checks, clock, frameworks
from .catalogue import DOCUMENTATION, SAMPLES, Kernel
from .outcomes import FAILED, PASSED, SKIPPED, Outcome, append

EXAMPLES = "nki/examples"
TUTORIALS = "src/nki_samples/tutorials"
GONE = (
    (
        re.compile(r"^\s*(from|import) neuronxcc", re.MULTILINE),
        "written for neuronxcc.nki, the language before NKI 0.2",
    ),
    (
        re.compile(r"torch_neuronx import nki_jit"),
        "imports torch_neuronx.nki_jit, which NKI no longer has",
    ),
    (
        re.compile(r"tensor_copy\([^)]*dtype="),
        "passes dtype= to nki.isa.tensor_copy, which no stub of NKI 0.2 to 0.6 has",
    ),
)


@dataclass(frozen=True)
class Script:
    """A script below its clone.

    rejected: it is an example of what does not work. function: what `check` calls.
    """

    name: str
    clone: str
    path: str
    check: checks.Check | None = None
    rejected: bool = False
    arguments: tuple[str, ...] = ()
    function: str = ""


def _documentation(name: str, path: str, **how: Any) -> Script:
    return Script(f"docs: {name}", DOCUMENTATION, f"{EXAMPLES}/{path}", **how)


def _sample(name: str, path: str, **how: Any) -> Script:
    return Script(f"samples: {name}", SAMPLES, f"{TUTORIALS}/{path}", **how)


_ATTENTION = {  # sequence length and element type, as in the tutorial's own test
    **dict.fromkeys(("1", "2"), (128, "float32")),
    **dict.fromkeys(("3", "4", "5", "6", "7", "8", "8a", "9"), (1024, "float32")),
    "10": (4096, "bfloat16"),
}
SCRIPTS = (
    _documentation("nki.simulate", "simulate/nki_simulate_example.py"),
    _documentation("getting started", "getting_started_baremetal.py", check=checks.sum_of_inputs),
    _documentation(
        "getting started, torch", "getting_started_torch.py", check=checks.sum_of_inputs
    ),
    _documentation("layout", "layout-pass.py", check=checks.exponential),
    _documentation("layout violation", "layout-violation.py", rejected=True),
    _documentation("layout, loop", "layout-loop.py", check=checks.exponential),
    _documentation("layout, dynamic loop", "layout-dynamic-loop.py", check=checks.exponential),
    _documentation("indexing 1", "index-case-1.py", check=checks.even_and_odd),
    _documentation("indexing 3", "index-case-3.py", check=checks.max_pool),
    _documentation(
        "tensor addition",
        "tensor_addition/tensor_addition_nki_kernels.py",
        check=checks.tile_addition,
    ),
    _documentation("transpose", "transpose2d/transpose2d_nki_kernels.py"),
    _documentation("transpose, torch", "transpose2d/transpose2d_torch.py"),
    _documentation("average pool", "average_pool2d/average_pool2d_nki_kernels.py"),
    _documentation("average pool, torch", "average_pool2d/average_pool2d_torch.py"),
    _documentation("matmul, torch", "matrix_multiplication/matrix_multiplication_torch.py"),
    _documentation("mamba", "fused_mamba/mamba_nki_kernels.py", arguments=("--seq_len", "1024")),
    _documentation("mamba, torch", "fused_mamba/mamba_torch.py"),
    _sample("matmul, torch", "matrix_multiplication/matrix_multiplication_torch.py"),
    _sample("mamba, torch", "fused_mamba/mamba_torch.py"),
    _sample("transpose, torch", "transpose2d/transpose2d_torch.py"),
    _sample("average pool, torch", "average_pool2d/average_pool2d_torch.py"),
    *(
        _sample(
            f"attention v{version}",
            "attention_fwd_performance/attention_kernels.py",
            check=checks.attention(f"attn_fwd_v{version}", *inputs),
            function=f"attn_fwd_v{version}",
        )
        for version, inputs in _ATTENTION.items()
    ),
    _sample("all-gather matmul ring", "allgather_matmul_ring/allgather_matmul_ring_torch.py"),
)


def script_kernels(clone: str) -> list[Kernel]:
    """The scripts of one repository as lines of the table."""
    return [Kernel(s.name, s.clone, s.path) for s in SCRIPTS if s.clone == clone]


def _unable(script: Script, path: Path) -> str:
    """Why a script cannot be run, or ''."""
    if not path.exists():
        return f"this clone has no {path.name}"
    text = path.read_text(encoding="utf-8")
    try:
        compile(text, str(path), "exec")
    except SyntaxError as error:
        return f"does not parse as published: line {error.lineno}: {error.msg}"
    if path.name.endswith("_torch.py"):
        kernels = path.with_name(path.name.replace("_torch.py", "_nki_kernels.py"))
        text += kernels.read_text(encoding="utf-8") if kernels.exists() else ""
    for pattern, why in GONE:
        if pattern.search(text):
            return why
    if script.function and f"def {script.function}(" not in text:
        return f"this clone has no {script.function}"
    return ""


def _execute(script: Script, path: Path) -> None:
    printed = io.StringIO()
    sys.argv = [str(path), *script.arguments]
    sys.path.insert(0, str(path.parent))
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(path), run_name="__main__")
    if " differ" in printed.getvalue():
        raise AssertionError("the script says: " + printed.getvalue().strip().splitlines()[-1])
    if script.check is not None:
        script.check(names)


def run(script: Script, path: Path, seconds: float) -> Outcome:
    """Run one script in this process, for at most `seconds` (0: no limit)."""
    reason = _unable(script, path)
    if reason:
        return Outcome(script.name, path.name, SKIPPED, reason)

    start = time.monotonic()
    status, reason = PASSED, ""
    try:
        with clock.limit(seconds):
            _execute(script, path)
        if script.rejected:
            status, reason = FAILED, "the documentation shows it as wrong, but it was accepted"
    except clock.RowTimeout as error:
        status, reason = SKIPPED, str(error)
    except Exception as error:
        if not (script.rejected and isinstance(error, NkiValidationError)):
            status, reason = FAILED, f"{type(error).__name__}: {error}"
    return Outcome(script.name, path.name, status, reason, round(time.monotonic() - start, 2))


def main(arguments: list[str]) -> int:
    """Run the script that is called NAME; 1 when it failed."""
    path, name, file, seconds = Path(arguments[0]), arguments[1], Path(arguments[2]), arguments[3]
    script = next(script for script in SCRIPTS if script.name == name)
    install()
    frameworks.provide()
    outcome = run(script, path, float(seconds))
    append(file, outcome)
    return int(outcome.status == FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
