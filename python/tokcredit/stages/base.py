"""What every stage has in common: typed and checked settings, the inputs it reads, schedules.

A stage is a frozen dataclass, so it prints, compares and pickles. Its settings are declared with the functions below,
which state the range; every setting is checked when the stage is made::

    @dataclass(frozen=True)
    class growing(Clip):
        low: float = number(at_least=0)
        power: float = number(0.5)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from tokcredit import inputs
from tokcredit.schedule import Adjustable, Schedule

T = TypeVar("T", bound="Stage")


@dataclass(frozen=True)
class Range:
    """What a setting may be.

    Attributes:
        kind: A word for the error: ``number``, ``whole number``, ``bool``, ``input name``, ``option`` or ``stage``.
        at_least: Smallest allowed number.
        above: Numbers must exceed it.
        at_most: Largest allowed number.
        below: Numbers must be less than it.
        optional: Whether None is allowed.
        scheduled: Whether a schedule or a controller is allowed in place of a number.
        options: Allowed values of an option.
        stage: Class that a stage must be an instance of.
        several: Whether the setting is a tuple of stages.
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

    def __str__(self) -> str:
        if self.kind == "option":
            text = "one of " + ", ".join(map(repr, self.options))
        elif self.kind == "stage":
            word = getattr(self.stage, "kind", "") or self.stage.__name__  # type: ignore[union-attr]
            text = f"a tuple of {word} stages" if self.several else f"a {word} stage"
        else:
            text = (
                "a bool" if self.kind == "bool" else f"an {self.kind}" if self.kind[0] in "aeiou" else f"a {self.kind}"
            )
            limits = [
                f"{word} {limit:g}"
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

    def checked(self, value: Any) -> Any:
        """Return the value in the declared type.

        Args:
            value: What was given.

        Raises:
            TypeError: It has another type.
            ValueError: It is out of range.
        """
        if (value is None and self.optional) or (isinstance(value, Adjustable) and self.scheduled):
            return value
        if self.kind == "number":
            if self.stage is not None and isinstance(value, self.stage):
                return value
            return self._number(value, float)
        if self.kind == "whole number":
            return self._number(value, int)
        if self.kind == "stage":
            return self._stage(value)
        if (self.kind == "bool" and not isinstance(value, bool)) or (
            self.kind != "bool" and not isinstance(value, str)
        ):
            raise TypeError
        if self.kind == "option" and value not in self.options:
            raise ValueError
        if self.kind == "input name":
            inputs.get(value)
        return value

    def _number(self, value: Any, kind: type) -> Any:
        wanted = numbers.Real if kind is float else numbers.Integral
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise TypeError
        number = kind(value)
        if math.isnan(number):
            raise ValueError
        inside = (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise ValueError
        return number

    def _stage(self, value: Any) -> Any:
        assert self.stage is not None
        if self.several and not isinstance(value, tuple):
            raise TypeError
        for part in value if self.several else (value,):
            if not isinstance(part, self.stage):
                raise TypeError
        return value


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
    or_stage: type | None = None,
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
        or_stage: Class of stages that are allowed in place of a number.
    """
    return _declared(Range("number", at_least, above, at_most, below, optional, scheduled, stage=or_stage), default)


def whole_number(
    default: Any = MISSING, *, at_least: int | None = None, at_most: int | None = None, optional: bool = False
) -> Any:
    """Declare a setting that is an int.

    Args:
        default: Default value; none if left out.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        optional: Whether None is allowed.
    """
    return _declared(Range("whole number", at_least=at_least, at_most=at_most, optional=optional), default)


def flag(default: Any = MISSING) -> Any:
    """Declare a setting that is a bool.

    Args:
        default: Default value; none if left out.
    """
    return _declared(Range("bool"), default)


def option(default: str, *others: str, optional: bool = False) -> Any:
    """Declare a setting that is one of some words, the first of which is the default.

    Args:
        default: Default value.
        others: Other allowed values.
        optional: Whether None is allowed.
    """
    return _declared(Range("option", options=(default, *others), optional=optional), default)


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


class Stage:
    """Base of all stages. Stages among the settings count as parts of the stage.

    Attributes:
        kind: Word for the kind of stage, for example ``clip``; empty for a part that is no stage of an objective.
        reads: Names of the inputs that the stage itself reads. ``required_inputs`` adds those of inner stages.
        whole_batch: Whether the stage compares rows of different groups.
        reads_rollouts: Whether a clip stage or a scale reads token ids, groups or rewards, which some hosts do not hand
            to their policy loss.
    """

    kind: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    whole_batch: ClassVar[bool] = False
    reads_rollouts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            self._check(f, getattr(self, f.name))

    def _check(self, setting: dataclasses.Field[Any], value: Any) -> None:
        """Set a setting to a value after checking it."""
        rule: Range | None = setting.metadata.get("range")
        try:
            object.__setattr__(self, setting.name, value if rule is None else rule.checked(value))
        except (TypeError, ValueError) as error:
            name = f"{self.kind}.{type(self).__name__}" if self.kind else type(self).__name__
            if str(error):
                raise type(error)(f"{name}: {setting.name}: {error}") from None
            raise type(error)(f"{name}: {setting.name}: expected {rule}, got {value!r}") from None

    def _settings(self) -> Iterator[Any]:
        """Yield the settings, and the elements of those that are tuples."""
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            yield from value if isinstance(value, tuple) else (value,)

    def stages(self) -> Iterator[Stage]:
        """Yield the stage itself and all stages among its settings and theirs."""
        yield self
        for value in self._settings():
            if isinstance(value, Stage):
                yield from value.stages()

    @property
    def required_inputs(self) -> frozenset[str]:
        """Names of the inputs that a batch must carry."""
        return self.reads.union(*(x.required_inputs for x in self._settings() if isinstance(x, Stage)))

    @property
    def compares_groups(self) -> bool:
        """Whether the result for a row depends on other groups, so that the stage must see the rows of all ranks."""
        return self.whole_batch or any(x.compares_groups for x in self._settings() if isinstance(x, Stage))

    @cached_property
    def adjustables(self) -> tuple[Adjustable, ...]:
        """Schedules and controllers among the settings, in order."""
        found: list[Adjustable] = []
        for value in self._settings():
            if isinstance(value, Adjustable):
                found.append(value)
            elif isinstance(value, Stage):
                found.extend(value.adjustables)
        return tuple(found)

    @property
    def is_scheduled(self) -> bool:
        """Whether a setting depends on the progress of training."""
        return any(isinstance(x, Schedule) for x in self.adjustables)

    def resolved(self: T, number: Callable[[Adjustable], float]) -> T:
        """Return the stage with every schedule and controller replaced by its number.

        Args:
            number: Gives the number of a schedule or a controller.
        """
        if not self.adjustables:
            return self

        # What was remembered of the stage holds of this one as well, but for its schedules.
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.__dict__.pop("adjustables", None)
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Adjustable):
                made._check(f, number(value))
            elif isinstance(value, Stage):
                object.__setattr__(made, f.name, value.resolved(number))
            elif isinstance(value, tuple):  # of stages
                parts = tuple(x.resolved(number) if isinstance(x, Stage) else x for x in value)
                object.__setattr__(made, f.name, parts)
        return made
