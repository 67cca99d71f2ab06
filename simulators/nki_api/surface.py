"""The modules that `import nki` and its submodules resolve to.

Built once per process; which generation a kernel belongs to is bound when @nki.jit decorates it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from . import collectives, dtypes, isa, jit, language


class _TensorAnnotation:
    """nki.typing.tensor: only ever an annotation."""

    def __getitem__(self, shape: Any) -> _TensorAnnotation:
        return self


def _typing() -> types.ModuleType:
    module = types.ModuleType("nki.typing", "Annotations.")
    module.__dict__["tensor"] = _TensorAnnotation()
    return module


class _DtypeModule(types.ModuleType):
    """nki.dtype: a module of the dtypes that also serves as an annotation."""

    def __call__(self, value: Any) -> dtypes.DType:
        return dtypes.dtype_of(value)

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


def _dtype() -> types.ModuleType:
    module = _DtypeModule("nki.dtype", "The element types.")
    every = (*dtypes.ALL, *dtypes.PACKED)
    module.__dict__.update({"bool_" if d == "bool" else str(d): d for d in every})
    return module


@functools.lru_cache(maxsize=1)
def nki_modules() -> dict[str, types.ModuleType]:
    """{"nki": ..., "nki.language": ..., "nki.isa": ..., ...}."""
    package = types.ModuleType("nki", "NKI on NumPy, by nxd_cp.simulators.nki_api.")
    package.__path__ = []
    parts = {
        "language": language,
        "isa": isa,
        "collectives": collectives,
        "typing": _typing(),
        "dtype": _dtype(),
    }
    package.__dict__.update(
        jit=jit.jit,
        simulate=jit.simulate,
        Kernel=jit.Kernel,
        __simulated__=True,
        **parts,
    )
    found = {"nki": package, **{f"nki.{name}": module for name, module in parts.items()}}
    found["nki.isa.constants"] = isa.enums
    return found
