"""The modules that `import nki` and its submodules resolve to.

Built once per process; which generation a kernel belongs to is bound when @nki.jit decorates it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from . import dtypes, isa, jit, language
from .errors import unsupported

SUBMODULES = ("language", "isa", "collectives", "typing")


def _collectives() -> types.ModuleType:
    module = types.ModuleType("nki.collectives", "Not implemented yet.")

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: unsupported(f"nki.collectives.{name}")

    module.__dict__["__getattr__"] = missing
    return module


class _TensorAnnotation:
    """nki.typing.tensor: only ever an annotation."""

    def __getitem__(self, shape: Any) -> _TensorAnnotation:
        return self


def _typing() -> types.ModuleType:
    module = types.ModuleType("nki.typing", "Annotations.")
    module.__dict__["tensor"] = _TensorAnnotation()
    return module


@functools.lru_cache(maxsize=1)
def nki_modules() -> dict[str, types.ModuleType]:
    """{"nki": ..., "nki.language": ..., "nki.isa": ..., ...}."""
    package = types.ModuleType("nki", "NKI on NumPy, by nxd_cp.simulators.nki_api.")
    package.__path__ = []
    parts = {"language": language, "isa": isa, "collectives": _collectives(), "typing": _typing()}
    package.__dict__.update(
        jit=jit.jit,
        simulate=jit.simulate,
        Kernel=jit.Kernel,
        dtype=dtypes.DType,
        __simulated__=True,
        **parts,
    )
    found = {"nki": package, **{f"nki.{name}": module for name, module in parts.items()}}
    found["nki.isa.constants"] = isa.enums
    return found
