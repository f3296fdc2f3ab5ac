"""Published methods, one file each: a function that returns the objective of the method.

``tokcredit.methods.tempo()``, ``tokcredit.methods.load("tempo")`` and ``tokcredit.mix("tempo")`` give the same.

The folder is the registry: ``methods/NAME.py`` holds ``def NAME(...)`` and the stages that only this method has. Types
of arguments are checked here, by their annotations, and ranges by the stages. An argument that no stage takes as it is
states its range itself: ``alpha: Annotated[float, Range("number", above=0)]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from tokcredit.objective import Objective
from tokcredit.preference import Preference
from tokcredit.settings import Range, RefusedError, nearest, rules
from tokcredit.supervised import Supervised

AnyObjective = Objective | Preference | Supervised

"""The objective of any method."""


def _checked(name: str, function: Callable[..., AnyObjective]) -> Callable[..., AnyObjective]:
    """Return a method whose errors about a setting name the method and its argument."""
    signature = inspect.signature(function)

    @wraps(function)
    def method(*positional: Any, **named: Any) -> AnyObjective:
        given = signature.bind(*positional, **named).arguments
        try:
            for argument, rule in rules(function).items():
                if argument in given:
                    given[argument] = rule.checked(f"{name}: {argument}", given[argument])
            return function(**given)
        except RefusedError:
            for argument, value in given.items():
                if narrower := _range(function, argument, value):
                    narrower.checked(f"{name}: {argument}", value)
            raise

    return method


def _range(function: Callable[..., AnyObjective], argument: str, value: Any) -> Range | None:
    """Return the range by which a stage refuses a value that a method passes on to it, or None if none refuses it."""
    try:
        function(**{argument: value})
    except RefusedError as error:
        if error.value is value:
            return replace(error.rule, optional=rules(function)[argument].optional)
    except Exception:  # A value of a wrong type may fail anywhere; the annotation has refused it already.
        pass
    return None


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
            got = f"an unknown setting{nearest(setting, known)}"
            raise TypeError(f"{setting}: expected one of {', '.join(known)} for {name}, got {got}")
    return _METHODS[name](**settings)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"no method {name!r}; there are {', '.join(names())}")
