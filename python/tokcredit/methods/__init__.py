"""Published methods, one file each: a function that returns the :class:`~tokcredit.objective.Objective`.

The folder is the registry: ``methods/NAME.py`` holds ``def NAME(...) -> Objective`` and nothing else is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tokcredit.objective import Objective

_METHODS: dict[str, Callable[..., Objective]] = {
    module.name: getattr(import_module(f"{__name__}.{module.name}"), module.name) for module in iter_modules(__path__)
}
globals().update(_METHODS)


def names() -> tuple[str, ...]:
    """Every method there is."""
    return tuple(sorted(_METHODS))


def load(name: str, **settings: Any) -> Objective:
    """The objective of a published method.

    Args:
        name: one of :func:`names`.
        settings: the method's own arguments; what it does not know is an error.
    """
    if name not in _METHODS:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    known = inspect.signature(_METHODS[name]).parameters
    for setting in settings:
        if setting not in known:
            raise TypeError(f"{setting}: expected one of {', '.join(known)} for {name}, got an unknown setting")
    return _METHODS[name](**settings)


def __getattr__(name: str) -> Callable[..., Objective]:
    raise AttributeError(f"no method {name!r}; there are {', '.join(names())}")
