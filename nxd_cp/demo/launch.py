"""Start the demo's workers with torchrun, follow what they print, and gather the records.

One launch per number of ranks; it does all the runs of that number, so that Python and torch start
once per rank.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nxd_cp.demo.settings import RunSettings, StepRecord

Records = dict[str, list[StepRecord]]


def launch(
    runs: list[RunSettings],
    num_ranks: int,
    out: Path,
    on_step: Callable[[str, StepRecord], None] | None = None,
) -> Records:
    """Run `runs` one after another on `num_ranks` processes of this machine.

    Args:
        runs: settings with distinct names.
        num_ranks: processes, one thread each, over gloo.
        out: folder for the settings and for the workers' error output.
        on_step: called with the run's name and its newest record.

    Returns:
        The records of each run by its name.

    Raises:
        RuntimeError: a worker failed, or a run is incomplete; the message ends with what was
            printed last.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = out / f"runs-{num_ranks}.json"
    settings.write_text(json.dumps([run.to_json() for run in runs], indent=2))
    log = out / f"workers-{num_ranks}.log"
    records: Records = {run.name: [] for run in runs}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "nxd_cp.demo.train", str(settings)]
    with log.open("w") as errors:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment()
        )
        assert worker.stdout is not None, "stdout was asked for as a pipe"
        try:
            for line in worker.stdout:
                if not line.startswith('{"run"'):
                    errors.write(line)
                    continue
                data = json.loads(line)
                name = data.pop("run")
                records[name].append(StepRecord.from_json(data))
                if on_step is not None:
                    on_step(name, records[name][-1])
            code = worker.wait()
        finally:
            worker.terminate()
            worker.wait()
    missing = [run.name for run in runs if len(records[run.name]) != run.num_steps]
    if code or missing:
        tail = "\n".join(log.read_text().splitlines()[-25:])
        raise RuntimeError(
            f"training on {num_ranks} ranks ended with exit status {code}, incomplete runs: "
            f"{missing}; the end of {log}:\n{tail}"
        )
    return records


def _environment() -> dict[str, str]:
    """One thread per rank; the package is found even where it is not installed."""
    top = str(Path(__file__).parents[2])
    path = os.pathsep.join(p for p in (top, os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
