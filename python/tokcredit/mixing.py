"""Mixing published methods: any stage of one method in another, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tokcredit import methods, schedule
from tokcredit.expression import Call, call_with, parse, read
from tokcredit.settings import Range, nearest, rules
from tokcredit.stages.base import Stage

T = TypeVar("T")


def mix(base: str | Stage, **stages: Any) -> Any:
    """Return an objective that is a published method with some stages replaced.

    Each replacement is the name of a method, which gives its stage of that kind; or a stage; or the text of one of
    these with settings. Kinds of which an objective has several (``filters``, ``token_weights``, ``scales``,
    ``terms``) also take a tuple or list. If a name is that of a stage and of a method, the stage is
    meant.

    Args:
        base: Name of a method, text such as ``"grpo(clip_high=0.28)"``, or an objective.
        stages: Replacements by kind: ``credit``, ``filters``, ``token_weights``, ``ratio``, ``clip``, ``scales``,
            ``aggregation``, ``terms`` of an ``Objective``; the fields of a ``Preference`` or ``Supervised`` objective.

    Raises:
        TypeError: The objective has no such kind of stage, or a stage is of the wrong kind.
        ValueError: There is no such method or stage, a setting is out of range, or two stages do not fit together.

    Example:
        >>> mix("grpo", credit="tempo", ratio="ctpo", clip="ctpo", aggregation="ba", terms="kl(0.01)")
    """
    objective: Any = _method(parse(base, "base"), "base") if isinstance(base, str) else base
    if not isinstance(objective, Stage):
        raise TypeError(f"base: expected a method or an objective, got {type(base).__name__}")
    kinds = {f.name: f.metadata["range"] for f in dataclasses.fields(objective) if "range" in f.metadata}  # type: ignore[arg-type]
    kinds = {name: rule for name, rule in kinds.items() if rule.kind == "stage"}
    changes = {}
    for kind, value in stages.items():
        if kind not in kinds:
            raise TypeError(f"{kind}: expected one of {', '.join(kinds)}, got an unknown kind of stage")
        changes[kind] = _stages(kind, kinds[kind], value)
    return dataclasses.replace(objective, **changes)  # type: ignore[type-var]


def known(kind: type[T]) -> dict[str, type[T]]:
    """Return all stages of a kind by name, those of methods and of the user included.

    Args:
        kind: Base class of the kind.
    """
    return {cls.__name__: cls for cls in _subclasses(kind) if dataclasses.is_dataclass(cls)}


def _subclasses(kind: type[T]) -> Iterator[type[T]]:
    for cls in kind.__subclasses__():
        yield from _subclasses(cls)
        yield cls


def inner() -> dict[str, Callable[..., Any]]:
    """Return what may stand among the settings of a stage: stages, schedules and controllers, by name."""
    return {**known(Stage), **known(schedule.Adjustable)}


def method(name: str, settings: Mapping[str, str]) -> Any:
    """Return the objective of a published method whose settings are given as text.

    Args:
        name: Name of the method.
        settings: Text of each setting: a number, ``true``, ``false``, ``none``, or a stage or schedule in the form of
            :func:`mix`.

    Raises:
        TypeError: The method does not have a setting, or it has the wrong type.
        ValueError: There is no such method, or a setting is out of range.
    """
    known = rules(getattr(methods, name)) if name in methods.names() else {}
    values = {x: read(text, known[x], f"{name}: {x}", inner()) if x in known else text for x, text in settings.items()}
    return methods.load(name, **values)


def _method(call: Call, argument: str) -> Any:
    functions: Mapping[str, Callable[..., Any]] = {name: getattr(methods, name) for name in methods.names()}
    return call_with(functions, call, argument)


def _stages(kind: str, rule: Range, value: Any) -> Any:
    if not rule.several:
        return _stage(kind, rule, value)
    if isinstance(value, str | Stage):
        value = _stage(kind, rule, value)
        return value if isinstance(value, tuple) else (value,)
    found: list[Any] = []
    for x in value:
        made = _stage(kind, rule, x)
        found.extend(made if isinstance(made, tuple) else (made,))
    return tuple(found)


def _stage(kind: str, rule: Range, value: Any) -> Any:
    """Return a stage, or the tuple of stages that a method has of this kind."""
    if not isinstance(value, str):
        return value
    assert rule.stage is not None
    call = parse(value, kind, inner())
    stages: dict[str, type] = known(rule.stage)
    if call.name in stages:
        return call_with(stages, call, kind)
    if call.name not in methods.names():
        names = sorted({*stages, *methods.names()})
        hint = nearest(call.name, names)
        raise ValueError(f"{kind}: expected a stage or a method, one of {', '.join(names)}, got {call.name!r}{hint}")
    objective = _method(call, kind)
    if not hasattr(objective, kind):
        raise ValueError(f"{kind}: expected a method with such a stage, got {call.name}, which has none")
    return getattr(objective, kind)
