"""Modules that nki-library's tests import and that a CPU run never uses.

Its conftest imports cloud, SSH and plotting packages, two modules that the public clone lacks
(test.utils.perf_analysis_private, test.utils.scripts), and the vendor's compiler. Those that
cannot be imported are replaced by modules whose names are classes that raise when used.
Does not stand in for anything that computes a kernel's result.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

STANDINS = frozenset(
    (
        "aws_embedded_metrics",
        "aws_embedded_metrics.logger",
        "aws_embedded_metrics.logger.metrics_context",
        "aws_embedded_metrics.serializers",
        "aws_embedded_metrics.serializers.log_serializer",
        "boto3",
        "botocore",
        "botocore.credentials",
        "botocore.exceptions",
        "debugpy",
        "fabric2",
        "paramiko",
        "plotext",
        "pytest_html",
        "pytest_html.extras",
        "test.utils.perf_analysis_private",
        "test.utils.scripts",
        "test.utils.scripts.remote_lock_scripts",
    )
)


def _absent(module: str, name: str) -> type[Exception]:
    """A class (an exception, so that `except` takes it) that raises when it is used."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{module}.{name} is a stand-in for an absent package; install {module}")

    return type(name, (Exception,), {"__init__": refuse, "__module__": module})


def standin(name: str) -> types.ModuleType:
    """A package called `name` whose attributes are such classes."""
    module = types.ModuleType(name, "Stand-in for an absent package.")
    module.__path__ = []

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}")
        return _absent(name, wanted)

    module.__dict__["__getattr__"] = attribute
    return module


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path: answers only for STANDINS, and only when nobody else does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for an absent module of the list."""
        if fullname not in STANDINS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The stand-in."""
        return standin(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def install() -> None:
    """Let absent packages of the list be imported as stand-ins in this process."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())
