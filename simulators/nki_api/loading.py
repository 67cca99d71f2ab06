"""Two ways to make `import nki` mean the simulator.

`load(package)` imports a second, private copy of a kernel package in which every `import nki`
(and every import of the package itself) is private too, by giving its modules an `__import__` of
their own. Nothing else in the process changes. `install()` puts the simulator into sys.modules,
for scripts and tests, and refuses to hide a real nki.

A placeholder `nki` from a public index (no nki.language) counts as absent.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import importlib.util
import sys
import threading
import types
from typing import Any

from . import chips
from .jit import BOUND_GENERATION
from .surface import nki_modules

_LOCK = threading.RLock()
_LOADED: dict[tuple[str, str], PrivateModule] = {}


def real_nki_present() -> bool:
    """Whether a working vendor `nki` can be imported (a placeholder cannot)."""
    if getattr(sys.modules.get("nki"), "__simulated__", False):
        return False
    try:
        return importlib.util.find_spec("nki.language") is not None
    except (ImportError, ValueError):
        return False


def install() -> None:
    """Make `import nki` give the simulator in this process.

    Raises RuntimeError when a real nki is present: use `load` for side-by-side runs.
    """
    if real_nki_present():
        raise RuntimeError("a real nki is installed; use load() to simulate beside it")
    sys.modules.update(nki_modules())


class PrivateModule(types.ModuleType):
    """A module of a private copy; submodules are imported on attribute access."""

    __importer__: _Importer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name == "nki":
            return nki_modules()["nki"]
        importer = self.__dict__["__importer__"]
        try:
            return importer.module(f"{self.__dict__['__real_name__']}.{name}")
        except ModuleNotFoundError as error:
            raise AttributeError(f"{self.__dict__['__real_name__']} has no {name!r}") from error


class _Importer:
    """Imports of one (package, generation) pair.

    Private modules are called `<prefix>.<real name>` and registered under that name, so that
    tools that look a module up by `__module__` (dataclasses, pickle) find the private one.
    """

    def __init__(self, package: str, generation: str) -> None:
        self.package = package
        self.generation = generation
        self.prefix = f"nki_simulated_{generation}"
        self.modules: dict[str, Any] = {}
        self.builtins = dict(vars(builtins))
        self.builtins["__import__"] = self.import_

    def owns(self, name: str) -> bool:
        return name == self.package or name.startswith(self.package + ".")

    def module(self, name: str) -> PrivateModule:
        """Import one module of the package privately, parents first."""
        with _LOCK:
            found = self.modules.get(name)
            if found is not None:
                return found
            parent = None
            if name != self.package:
                parent = self.module(name.rpartition(".")[0])
                found = self.modules.get(name)
                if found is not None:
                    return found
            spec = self._find(name, parent)
            module = self._create(name, spec)
            try:
                self._execute(module, spec)
            except BaseException:
                del self.modules[name]
                sys.modules.pop(module.__name__, None)
                raise
            if parent is not None:
                setattr(parent, name.rpartition(".")[2], module)
            return module

    def _find(self, name: str, parent: Any) -> importlib.machinery.ModuleSpec:
        if parent is None:
            spec = importlib.util.find_spec(name)
        else:
            path = getattr(parent, "__path__", None)
            spec = None
            if path is not None:
                private = f"{self.prefix}.{name}"
                spec = importlib.machinery.PathFinder.find_spec(private, list(path))
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec

    def _create(self, name: str, spec: importlib.machinery.ModuleSpec) -> PrivateModule:
        private = f"{self.prefix}.{name}"
        module = PrivateModule(private)
        package = spec.submodule_search_locations
        values: dict[str, Any] = {
            "__importer__": self,
            "__real_name__": name,
            "__builtins__": self.builtins,
            "__file__": spec.origin,
            "__spec__": None,
            "__package__": private if package is not None else private.rpartition(".")[0],
        }
        if package is not None:
            values["__path__"] = list(package)
        module.__dict__.update(values)
        self.modules[name] = module
        sys.modules[private] = module
        return module

    def _execute(self, module: Any, spec: importlib.machinery.ModuleSpec) -> None:
        loader = spec.loader
        get_code = getattr(loader, "get_code", None)
        if spec.origin is None or get_code is None:
            return  # a namespace package
        code = get_code(spec.name)
        token = BOUND_GENERATION.set(self.generation)
        try:
            exec(code, module.__dict__)
        finally:
            BOUND_GENERATION.reset(token)

    def import_(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        """`__import__` of private modules."""
        if level:
            base = globals["__package__"]
            for _ in range(level - 1):
                base = base.rpartition(".")[0]
            base = base.removeprefix(self.prefix + ".")
            name = f"{base}.{name}" if name else base
        top = name.partition(".")[0]
        if top == "nki":
            return self._import_nki(name, fromlist)
        if not self.owns(name):
            if not level and self.package.startswith(name + ".") and fromlist:
                return self._parent(name, fromlist)
            return builtins.__import__(name, globals, locals, fromlist, 0)
        module = self.module(name)
        if fromlist:
            self._import_members(module, name, fromlist)
            return module
        return self._shell(name)

    def _import_nki(self, name: str, fromlist: Any) -> Any:
        modules = nki_modules()
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r} in the NKI simulator", name=name)
        return modules[name] if fromlist else modules["nki"]

    def _import_members(self, module: Any, name: str, fromlist: Any) -> None:
        for member in fromlist:
            if member != "*" and member not in module.__dict__ and hasattr(module, "__path__"):
                try:
                    self.module(f"{name}.{member}")
                except ModuleNotFoundError as error:
                    if error.name != f"{name}.{member}":
                        raise

    def _shell(self, name: str) -> Any:
        """What `import a.b.c` binds: the top module, with a private path down to the package."""
        if name.partition(".")[0] == self.package:
            return self.module(self.package)
        outer = self.package.split(".")
        below: Any = self.module(self.package)
        for depth in range(len(outer) - 1, 0, -1):
            shell = types.ModuleType(".".join(outer[:depth]))
            shell.__dict__[outer[depth]] = below
            below = shell
        return below

    def _parent(self, name: str, fromlist: Any) -> Any:
        """`from parent import package`: the real parent, but our private child."""
        real = builtins.__import__(name, None, None, fromlist, 0)
        child = self.package[len(name) + 1 :].partition(".")[0]
        if child not in fromlist:
            return real
        shell = types.ModuleType(name)
        shell.__dict__.update(vars(real))
        inner = self._shell(self.package)
        for part in f"{name}.{child}".split(".")[1:]:
            inner = getattr(inner, part)
        shell.__dict__[child] = inner
        return shell


def load(package: str, *, generation: str | None = None, module: str = "") -> Any:
    """A private copy of `package` bound to the simulator, cached by (package, generation).

    module: the dotted name below the package of the module to return, where the package puts
    something else at that attribute; by default the package itself.
    generation: "gen2" (trn1, inf2), "gen3" (trn2), "gen4" (trn3); by default the environment's
    NEURON_PLATFORM_TARGET_OVERRIDE, else gen4, as in the vendor's simulator. Submodules are
    imported on attribute access; `.nki` is the simulator's nki. Calling a @nki.jit function of
    the copy simulates it. Raises ModuleNotFoundError, or whatever the package raises.
    """
    target = chips.generation_name(generation)
    key = (package, target)
    with _LOCK:
        if key not in _LOADED:
            _LOADED[key] = _Importer(package, target).module(package)
        root = _LOADED[key]
        return root.__importer__.module(f"{package}.{module}") if module else root
