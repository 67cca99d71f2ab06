"""NKIObject: the base class of classes used in kernels, with the initialiser that NKI gives them.

With or without @dataclass, the fields are the annotated names and the plain class attributes, in
order; all may be left out. A class with an __init__ of its own keeps it.

Source: NKI language guide, Class Support.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any


class NKIObject:
    """Base class for kernel dataclasses and configuration objects."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if all("__init__" not in vars(base) for base in _lineage(cls)):
            cls.__init__ = _initialiser  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Runs after the generated initialiser."""


def _lineage(cls: type) -> list[type]:
    return [base for base in reversed(cls.__mro__) if base not in (object, NKIObject)]


def _fields(cls: type) -> dict[str, Any]:
    """Field names and defaults (None where there is none)."""
    found: dict[str, Any] = {}
    for base in _lineage(cls):
        names = [*inspect.get_annotations(base), *vars(base)]
        for name in dict.fromkeys(names):
            value = vars(base).get(name)
            method = callable(value) or hasattr(value, "__get__")
            if not name.startswith("__") and not method:
                found[name] = value
    return found


def _default(cls: type, name: str, value: Any) -> Any:
    known = getattr(cls, "__dataclass_fields__", {}).get(name, value)
    if not isinstance(known, dataclasses.Field):
        return value
    if known.default_factory is not dataclasses.MISSING:
        return known.default_factory()
    return None if known.default is dataclasses.MISSING else known.default


def _initialiser(self: Any, *args: Any, **kwargs: Any) -> None:
    cls = type(self)
    fields = _fields(cls)
    if len(args) > len(fields):
        raise TypeError(f"{cls.__name__} has {len(fields)} fields, got {len(args)} values")
    given = dict(zip(fields, args, strict=False))
    for name, value in kwargs.items():
        if name not in fields or name in given:
            raise TypeError(f"{cls.__name__}: unexpected or repeated field {name!r}")
        given[name] = value
    for name, value in fields.items():
        chosen = given[name] if name in given else _default(cls, name, value)
        object.__setattr__(self, name, chosen)
    self.__post_init__()
