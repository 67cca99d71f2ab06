"""Kernels of many ranks in nki-library's test driver.

Its simulation mode calls one kernel with one dict of inputs; tests of collectives give inputs and
references per rank, which its validator reads from one folder per rank. This adds that: all ranks
run together, each rank's outputs go to output_worker_<rank>/<name>.bin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nxd_cp.simulators import nki_api

from .modules import check_cores


def outputs_of_ranks(test: Any, golden_of: Any) -> list[dict[str, Any]]:
    """Run `test` (nki-library's KernelArgs) on its ranks: {output name: array} of each rank.

    golden_of: its normalize_golden_output, which names the outputs.
    """
    ranks = test.inference_args.collective_ranks
    given = test.kernel_input
    inputs = [given.for_rank(r) if hasattr(given, "for_rank") else given for r in range(ranks)]
    cleaned = [{k.removesuffix(".must_alias_input"): v for k, v in i.items()} for i in inputs]
    check_cores(test.compiler_input.logical_nc_config)
    results = nki_api.simulate_ranks(
        test.kernel_func, cleaned, lnc=test.compiler_input.logical_nc_config
    )
    named = []
    for rank, result in enumerate(results):
        golden = golden_of(test.validation_args.golden_output, rank)
        arrays = list(result) if isinstance(result, (list, tuple)) else [result]
        if len(arrays) != len(golden):
            raise RuntimeError(f"rank {rank}: expected outputs {list(golden)}, got {len(arrays)}")
        pairs = zip(golden, arrays, golden.values(), strict=True)
        named.append({name: np.asarray(a, dtype=like.dtype) for name, a, like in pairs})
    return named


def write(folder: Path, outputs: list[dict[str, Any]]) -> str:
    """The files that the validator reads; returns their folder."""
    for rank, arrays in enumerate(outputs):
        place = folder / f"output_worker_{rank}"
        place.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            (place / f"{name}.bin").write_bytes(array.tobytes())
    return str(folder)


def patch(orchestrator: Any) -> None:
    """Teach nki-library's test_orchestrator module (in memory) to run tests of many ranks.

    Also supplies `_compiled_kernel`, which its simulation mode reads without having set it, and
    simulates tests that ask for the vendor's tracer alone (marked trace_only).
    """
    driver = orchestrator.Orchestrator
    one_rank = driver._run_simulator_inference

    def run(self: Any, test: Any) -> Any:
        if test.inference_args.collective_ranks == 1:
            return one_rank(self, test)
        try:
            outputs = outputs_of_ranks(test, orchestrator.normalize_golden_output)
        except Exception as error:
            raise orchestrator.InferenceException(str(error)) from error
        base = Path(self.fs_config.artifacts_output_directory_path)
        return write(base / orchestrator.INF_ARTIFACT_DIR_NAME, outputs)

    compilation = driver._run_compilation

    def skip_compilation(self: Any, *args: Any) -> Any:
        self.trace_mode = orchestrator.TraceMode.Simulator
        return compilation(self, *args)

    driver._run_compilation = skip_compilation
    driver._run_simulator_inference = run
    driver._compiled_kernel = None
