"""Settings of stages, methods and commands: their types, their ranges, and errors that name them.

A setting is a field of a frozen dataclass, declared with one of the functions below, which states the range. It is
checked when the dataclass is made::

    @dataclass(frozen=True)
    class growing(Clip):
        low: float = number(at_least=0)
        power: float = number(0.5)
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from tokcredit import inputs


class RefusedError(Exception):
    """Base of errors about one setting. They are also a ``TypeError`` or a ``ValueError``.

    Args:
        name: Name of the setting.
        rule: What it may be.
        value: What was given.
    """

    def __init__(self, name: str, rule: Range, value: Any) -> None:
        expected = str(rule)
        if rule.kind == "number" and isinstance(value, float) and math.isinf(value) and not rule.infinite:
            expected = expected.replace("number", "finite number", 1)
        super().__init__(f"{name}: expected {expected}, got {shown(value)}{nearest(value, rule.options)}")
        self.name, self.rule, self.value = name, rule, value

    def of(self, name: str) -> RefusedError:
        """Return the same error about a setting with another name.

        Args:
            name: Name of the setting.
        """
        return type(self)(name, self.rule, self.value)


class WrongTypeError(RefusedError, TypeError):
    """A setting has the wrong type."""


class OutOfRangeError(RefusedError, ValueError):
    """A setting has the right type and is out of range."""


def nearest(word: Any, words: Iterable[str]) -> str:
    """Return the end of an error that asks whether the most similar of some words was meant, or nothing without one.

    Args:
        word: What was given.
        words: What may be given.
    """
    near = difflib.get_close_matches(str(word).lower(), list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which no tokenizer takes.

    Args:
        text: The text.
    """
    return not any("\ud800" <= x <= "\udfff" for x in text)


def shown(value: Any) -> str:
    """Return how a value is shown in an error: as Python prints it, and whole numbers without a decimal point.

    Args:
        value: What was given.
    """
    return repr(value).removesuffix(".0") if isinstance(value, float) else repr(value)


@dataclass(frozen=True)
class Range:
    """What a setting may be.

    Attributes:
        kind: A word for the error: ``number``, ``whole number``, ``numbers by name``, ``bool``, ``text``, ``path``,
            ``input name``, ``option`` or ``stage``.
        at_least: Smallest allowed number.
        above: Numbers must exceed it.
        at_most: Largest allowed number.
        below: Numbers must be less than it.
        optional: Whether None is allowed.
        scheduled: Whether a schedule or a controller is allowed in place of a number.
        options: Allowed values of an option.
        stage: Class that a stage must be an instance of.
        several: Whether the setting is a tuple.
        infinite: Whether a number may be infinite.
    """

    kind: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    optional: bool = False
    scheduled: bool = False
    options: tuple[str, ...] = ()
    stage: type | None = None
    several: bool = False
    infinite: bool = False

    @classmethod
    def of(cls, annotation: Any) -> Range | None:
        """Return what an annotation allows, or None if it says nothing about values.

        A ``float`` may be any number but NaN, and a schedule.

        Args:
            annotation: A type, or ``Annotated`` with a :class:`Range`.
        """
        for extra in getattr(annotation, "__metadata__", ()):
            if isinstance(extra, cls):
                return extra
        if hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        either = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        members = [x for x in either if x not in (types.NoneType, Adjustable)]
        several = len(members) == 1 and get_origin(members[0]) is tuple
        if several:
            members = [x for x in get_args(members[0]) if x is not ...]
        stages = [x for x in members if _is_class(x)]
        rest = [x for x in members if x not in stages]
        more: dict[str, Any] = {"optional": types.NoneType in either, "several": several}
        if len(stages) > 1 or len(rest) > 1 or not members:
            return None
        if not rest:
            return cls("stage", stage=stages[0], **more)
        if get_origin(rest[0]) is Literal:
            return cls("option", options=get_args(rest[0]), **more)
        kind = _KINDS.get(rest[0])
        more["scheduled"] = more["infinite"] = kind == "number"
        return cls(kind, stage=stages[0] if stages else None, **more) if kind else None

    def __str__(self) -> str:
        if self.kind == "option":
            text = f"{'several' if self.several else 'one'} of {', '.join(map(repr, self.options))}"
        elif self.kind == "stage":
            word = getattr(self.stage, "kind", "") or self.stage.__name__  # type: ignore[union-attr]
            text = f"a tuple of {word} stages" if self.several else f"a {word} stage"
        else:
            article = {"text": "", "input name": "an ", "numbers by name": ""}.get(self.kind, "a ")
            text = f"{self.kind}s" if self.several else article + self.kind
        limits = [
            f"{word} {limit:.15g}"
            for word, limit in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if limit is not None
        ]
        text += " " + " and ".join(limits) if limits else ""
        return text + (" (or a schedule)" if self.scheduled else "") + (" or None" if self.optional else "")

    def checked(self, name: str, value: Any) -> Any:
        """Return the value in the declared type.

        Args:
            name: Name of the setting, for errors.
            value: What was given.

        Raises:
            WrongTypeError: It has another type.
            OutOfRangeError: It is out of range.
            ValueError: It is no name of an input.
        """
        if (value is None and self.optional) or (isinstance(value, Adjustable) and self.scheduled):
            return value
        if self.several and isinstance(value, list) and self.kind != "stage":
            value = tuple(value)
        if self.several and not isinstance(value, tuple):
            raise WrongTypeError(name, self, value)
        try:
            return tuple(map(self._one, value)) if self.several else self._one(value)
        except (TypeError, ValueError) as error:
            if str(error):
                raise type(error)(f"{name}: {error}") from None
            refused = WrongTypeError if isinstance(error, TypeError) else OutOfRangeError
            raise refused(name, self, value) from None

    def _one(self, value: Any) -> Any:
        """Return one value in the declared type, or raise a bare error."""
        if self.stage is not None and isinstance(value, self.stage):
            return value
        if self.kind in ("number", "whole number"):
            return self._number(value)
        if self.kind == "numbers by name" and isinstance(value, dict) and all(isinstance(x, str) for x in value):
            return {x: self._number(weight) for x, weight in value.items()}
        wanted: Any = {"bool": bool, "path": str | Path, "stage": (), "numbers by name": ()}.get(self.kind, str)
        if not isinstance(value, wanted):
            raise TypeError
        if self.kind == "path":
            return Path(value)
        if self.kind == "text" and not is_unicode(value):
            raise ValueError(f"expected a text without lone surrogates, got {value!r}")
        if self.kind == "option" and value not in self.options:
            raise ValueError
        if self.kind == "input name":
            inputs.get(value)
        return value

    def _number(self, value: Any) -> float:
        whole = self.kind == "whole number"
        if type(value) is not (int if whole else float):
            wanted: Any = numbers.Integral if whole else numbers.Real
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise TypeError
        if not self._inside(value):
            raise ValueError
        return int(value) if whole else float(value)

    def _inside(self, number: Any) -> bool:
        return (
            not math.isnan(number)
            and (self.infinite or not math.isinf(number))
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def read(self, text: str) -> Any:
        """Return the value that a text stands for, or the text itself if it stands for none of this kind.

        Args:
            text: What was typed. ``true``, ``false``, ``none``, ``inf`` and ``nan`` are read in any case.
        """
        word = text.strip().lower()
        if self.optional and word == "none":
            return None
        if self.kind == "bool":
            return {"true": True, "false": False}.get(word, text)
        kinds: dict[str, Callable[[str], Any]] = {"number": float, "whole number": int, "path": Path}
        read = kinds.get(self.kind, str)
        try:
            return read(text)
        except ValueError:
            return text


def _is_class(x: Any) -> bool:
    """Return whether an annotation is a class whose instances can be told, and not one of those with a kind."""
    return isinstance(x, type) and get_origin(x) is None and x not in _KINDS and x is not Any and x is not object


_KINDS: dict[Any, str] = {
    float: "number",
    int: "whole number",
    bool: "bool",
    str: "text",
    Path: "path",
    dict[str, float]: "numbers by name",
}


def _declared(rule: Range, default: Any) -> Any:
    return field(default=default, metadata={"range": rule})


def number(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    optional: bool = False,
    scheduled: bool = False,
    infinite: bool = False,
    or_stage: type | None = None,
    several: bool = False,
) -> Any:
    """Declare a setting that is a float. NaN is never allowed; an int becomes a float.

    Args:
        default: Default value; none if left out.
        at_least: Smallest allowed value.
        above: Values must exceed it.
        at_most: Largest allowed value.
        below: Values must be less than it.
        optional: Whether None is allowed.
        scheduled: Whether a schedule or a controller is allowed.
        infinite: Whether inf is allowed, and -inf.
        or_stage: Class of stages that are allowed in place of a number.
        several: Whether the setting is a tuple of numbers.
    """
    rule = Range(
        "number", at_least, above, at_most, below, optional, scheduled, (), or_stage, several, infinite=infinite
    )
    return _declared(rule, default)


def whole_number(
    default: Any = MISSING,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
    optional: bool = False,
    several: bool = False,
) -> Any:
    """Declare a setting that is an int.

    Args:
        default: Default value; none if left out.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        optional: Whether None is allowed.
        several: Whether the setting is a tuple of ints.
    """
    rule = Range("whole number", at_least=at_least, at_most=at_most, optional=optional, several=several)
    return _declared(rule, default)


def flag(default: Any = MISSING) -> Any:
    """Declare a setting that is a bool.

    Args:
        default: Default value; none if left out.
    """
    return _declared(Range("bool"), default)


def option(default: Any, *others: str, optional: bool = False, several: bool = False) -> Any:
    """Declare a setting that is one of some words.

    Args:
        default: Default value, which is allowed as well.
        others: Other allowed values.
        optional: Whether None is allowed.
        several: Whether the setting is a tuple of such words.
    """
    options = tuple(dict.fromkeys((*(default if several else (default,)), *others)))
    return _declared(Range("option", options=options, optional=optional, several=several), default)


def input_name(default: Any = MISSING, *, optional: bool = False) -> Any:
    """Declare a setting that names a registered input.

    Args:
        default: Default value; none if left out.
        optional: Whether None is allowed.
    """
    return _declared(Range("input name", optional=optional), default)


def part(kind: type, default: Callable[[], Any] | Any | None = MISSING, *, optional: bool = False) -> Any:
    """Declare a setting that is another stage.

    Args:
        kind: Class that the stage must be an instance of.
        default: Function that makes the default, or None, or left out for no default.
        optional: Whether None is allowed.
    """
    rule = {"range": Range("stage", stage=kind, optional=optional)}
    if default is MISSING or default is None:
        return field(default=default, metadata=rule)
    return field(default_factory=default, metadata=rule)


def parts(kind: type) -> Any:
    """Declare a setting that is a tuple of stages, empty by default.

    Args:
        kind: Class that each stage must be an instance of.
    """
    return _declared(Range("stage", stage=kind, several=True), ())


def rules(of: Any) -> Mapping[str, Range]:
    """Return what the settings of a function or of a dataclass may be, by name, as far as that is stated.

    Args:
        of: A dataclass or a function. What a field does not declare is read from its annotation.
    """
    return _rules(of)


@functools.cache
def _rules(of: Any) -> Mapping[str, Range]:
    declared = {f.name: f.metadata["range"] for f in fields(of) if "range" in f.metadata} if is_dataclass(of) else {}
    try:
        hints = get_type_hints(of, include_extras=True)
    except NameError:  # a class that a user defined inside a function
        hints = {}
    annotated = {x: Range.of(hints[x]) for x in inspect.signature(of).parameters if x in hints}
    return {x: rule for x, rule in (annotated | declared).items() if rule is not None}


class Declared:
    """Base of frozen dataclasses whose settings are checked when they are made. Annotations count as declarations."""

    def __post_init__(self) -> None:
        for name in rules(type(self)):
            self._set(name, getattr(self, name))

    def _set(self, name: str, value: Any) -> None:
        """Set a setting to a value after checking it."""
        rule = rules(type(self)).get(name)
        object.__setattr__(self, name, value if rule is None else rule.checked(self._named(name), value))

    def _named(self, name: str) -> str:
        """Return the name of a setting for errors."""
        return name


class Adjustable(Declared, float if TYPE_CHECKING else object):  # type: ignore[misc]
    """Base of schedules and controllers, which may be given in place of a number."""

    def _named(self, name: str) -> str:
        return f"{type(self).__name__}: {name}"
