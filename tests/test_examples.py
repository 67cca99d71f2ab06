"""Every example runs as its first lines say, on 2 ranks, and prints what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def _run(name, *arguments, launcher=TORCHRUN, status=0):
    """What the example prints; a usage error (status 2) prints to stderr."""
    command = [*launcher, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr if status else done.stdout


def _numbers(text, pattern):
    found = re.search(pattern, text)
    assert found, f"expected {pattern!r} in {text!r}"
    return [float(number) for number in found.groups()]


def test_every_example_is_tested():
    named = Path(__file__).read_text()
    scripts = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
    assert [name for name in scripts if f'_run("{name}"' not in named] == []


def test_fine_tuning_gives_the_losses_of_one_rank():
    losses = r"first loss ([\d.]+), last loss ([\d.]+)"
    arguments = ("--steps=3", "--seq-len=256")
    two = _numbers(_run("hf_finetune", *arguments), losses)
    one = _numbers(_run("hf_finetune", *arguments, launcher=(sys.executable,)), losses)
    assert two == pytest.approx(one, rel=1e-5)
    assert two[1] < two[0]


def test_a_window_sends_less():
    printed = _run("window_model", "--steps=1", "--seq-len=512", "--window=64")
    (whole,) = _numbers(printed, r"no window: ([\d.]+) MiB")
    (window,) = _numbers(printed, r"window 64: ([\d.]+) MiB")
    assert 0 < window < whole


def test_a_document_is_the_same_alone_and_packed():
    printed = _run("packed_documents", "--steps=1")
    alone, packed = _numbers(printed, r"loss: ([\d.]+) alone, ([\d.]+) behind")
    assert alone > 0
    assert packed == pytest.approx(alone, rel=1e-5)


def test_the_titan_style_model_trains():
    (loss,) = _numbers(_run("titan_style", "--steps=8", "--seq-len=256"), r"last loss ([\d.]+)")
    assert loss < 5.54, "below that of the first step, ln 256"


def test_generated_tokens_are_those_of_one_rank():
    arguments = ("--new-tokens=6",)
    two = _run("generate", *arguments).splitlines()[-1]
    assert two == _run("generate", *arguments, launcher=(sys.executable,)).splitlines()[-1]
    assert len(two.split(",")) == 6


def test_what_an_example_cannot_do_is_a_usage_error(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("short")
    alone = {"launcher": (sys.executable,), "status": 2}
    assert "the text has 5 tokens, got 2048" in _run("hf_finetune", f"--text={text}", **alone)
    assert "three documents" in _run("packed_documents", "--seq-len=256", **alone)
