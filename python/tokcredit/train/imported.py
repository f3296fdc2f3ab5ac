"""Functions of the user, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

_OTHER_TRAINERS = {"completions": "TRL", "prompts": "TRL", "solution_str": "verl", "queries": "OpenRLHF"}


def function(path: str, setting: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """Return a function that takes some arguments by position.

    Args:
        path: ``package.module:function``.
        setting: Name of the setting, for errors.
        arguments: Names of the arguments, for errors.

    Raises:
        ValueError: The path has no colon, or names no module or no function, or the function takes other arguments.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"{setting}: expected package.module:function, got {path!r}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{setting}: expected a module that can be imported, got {module!r}: {error}") from None
    if not callable(found) or isinstance(found, type) or inspect.iscoroutinefunction(found):
        kind = "a class" if isinstance(found, type) else "an async function" if callable(found) else repr(name)
        raise ValueError(f"{setting}: expected a function in {module}, got {kind}")
    try:
        signature = inspect.signature(found)
    except ValueError:  # a function in C may not tell
        return found
    expected = f"{setting}: expected a function of ({', '.join(arguments)})"
    if other := next((_OTHER_TRAINERS[x] for x in signature.parameters if x in _OTHER_TRAINERS), None):
        raise ValueError(f"{expected}, got {path}{signature}, which is that of {other}; write one that calls it")
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{expected}, got {path}{signature}: {error}") from None
    return found
