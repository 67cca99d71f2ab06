"""What a test of a kernel needs: run it for one generation, read its log, expect a broken rule.

The pytest plugin hands it out as a fixture; it works without pytest, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import NkiValidationError
from .jit import Kernel, simulate, simulate_ranks
from .log import Log
from .params import SimParams, parameters
from .runtime import record


@dataclass
class Simulator:
    """Runs kernels for one generation; the fixture `nki_simulator` is one.

    generation: "gen2", "gen3" or "gen4". params: the checks. log: the last run's instructions.
    """

    generation: str
    params: SimParams
    log: Log = field(default_factory=Log)

    def run(self, kernel: Any, *args: Any, lnc: int | None = None, **kwargs: Any) -> Any:
        """Call a kernel (or a plain function as one) on `lnc` cores; its outputs.

        args: NumPy arrays or torch tensors. Raises NkiValidationError for a broken rule.
        """
        made = simulate(kernel)
        with parameters(self.params), record() as self.log:
            return Kernel(made.function, self.generation, lnc or made.lnc)(*args, **kwargs)

    def run_ranks(
        self,
        kernel: Any,
        arguments: Sequence[Sequence[Any] | Mapping[str, Any]],
        *,
        lnc: int | None = None,
    ) -> list[Any]:
        """Call a kernel on len(arguments) ranks at once; the outputs of each rank."""
        with parameters(self.params):
            return simulate_ranks(kernel, arguments, lnc=lnc, generation=self.generation)

    @contextmanager
    def rejects(self, rule: str) -> Iterator[None]:
        """The block must break the rule of this id (docs/simulator_rules.md), else the test fails.

        Rules of the inferred tier count, too, because they raise inside the block.
        """
        before = self.params
        self.params = replace(before, strict=True)
        try:
            with parameters(self.params):
                yield
        except NkiValidationError as error:
            if f"rule {rule} " not in str(error):
                raise
        else:
            raise AssertionError(f"expected the kernel to break rule {rule}; it broke none")
        finally:
            self.params = before
