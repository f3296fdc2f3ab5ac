"""Published methods, one file each: a function that returns the objective of the method.

The folder is the registry: ``methods/NAME.py`` holds ``def NAME(...)`` and the stages that only this method has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tokcredit.objective import Objective
from tokcredit.preference import Preference
from tokcredit.supervised import Supervised

AnyObjective = Objective | Preference | Supervised

_METHODS: dict[str, Callable[..., AnyObjective]] = {
    module.name: getattr(import_module(f"{__name__}.{module.name}"), module.name) for module in iter_modules(__path__)
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


def __getattr__(name: str) -> Callable[..., AnyObjective]:
    raise AttributeError(f"no method {name!r}; there are {', '.join(names())}")
