"""Published methods, one file each: a function that returns the objective of the method.

``tokcredit.methods.tempo()``, ``tokcredit.methods.load("tempo")`` and ``tokcredit.mix("tempo")`` give the same.

The folder is the registry: ``methods/NAME.py`` holds ``def NAME(...)`` and the stages that only this method has. Types
of arguments are checked here, by their annotations, and ranges by the stages.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from numbers import Real
from pkgutil import iter_modules
from typing import Any

from tokcredit.objective import Objective
from tokcredit.preference import Preference
from tokcredit.schedule import Adjustable
from tokcredit.stages.base import Stage
from tokcredit.supervised import Supervised

AnyObjective = Objective | Preference | Supervised

"""The objective of any method."""


def _checked(name: str, function: Callable[..., AnyObjective]) -> Callable[..., AnyObjective]:
    """Return a method that checks the types of arguments annotated as bool or float before it runs."""
    signature = inspect.signature(function)

    @wraps(function)
    def method(*positional: Any, **named: Any) -> AnyObjective:
        for argument, value in signature.bind(*positional, **named).arguments.items():
            annotation = str(signature.parameters[argument].annotation)
            if annotation == "bool" and not isinstance(value, bool):
                raise TypeError(f"{name}: {argument}: expected a bool, got {value!r}")
            if not annotation.startswith("float") or isinstance(value, Adjustable | Stage):
                continue
            if value is None and "None" in annotation:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: {argument}: expected a number, got {value!r}")
            if math.isnan(value):
                raise ValueError(f"{name}: {argument}: expected a number, got nan")
        return function(*positional, **named)

    return method


_METHODS: dict[str, Callable[..., AnyObjective]] = {
    name: _checked(name, getattr(import_module(f"{__name__}.{name}"), name))
    for name in (module.name for module in iter_modules(__path__))
}
globals().update(_METHODS)


def names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(sorted(_METHODS))


def load(name: str, **settings: Any) -> Any:
    """Return the objective of a published method.

    Args:
        name: One of :func:`names`.
        settings: Arguments of the method.

    Raises:
        TypeError: The method does not have a setting, or it has the wrong type.
        ValueError: There is no such method, or a setting is out of range.
    """
    if name not in _METHODS:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    known = inspect.signature(_METHODS[name]).parameters
    for setting in settings:
        if setting not in known:
            raise TypeError(f"{setting}: expected one of {', '.join(known)} for {name}, got an unknown setting")
    return _METHODS[name](**settings)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"no method {name!r}; there are {', '.join(names())}")
