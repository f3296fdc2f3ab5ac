"""What every stage has in common: checked settings, the inputs it reads, schedules.

A stage is a frozen dataclass, so it prints, compares and pickles. Its settings are declared with the functions of
:mod:`tokcredit.settings`, which are also the names of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeVar

from tokcredit.schedule import Schedule
from tokcredit.settings import (
    Adjustable,
    Declared,
    Range,
    flag,
    input_name,
    number,
    option,
    part,
    parts,
    whole_number,
)

__all__ = ["InputName", "Range", "Stage", "flag", "input_name", "number", "option", "part", "parts", "whole_number"]

InputName = Annotated[str, Range("input name")]
"""Annotation of a method's argument that names an input."""

T = TypeVar("T", bound="Stage")


class Stage(Declared):
    """Base of all stages. Stages among the settings count as parts of the stage.

    Attributes:
        kind: Word for the kind of stage, for example ``clip``; empty for a part that is no stage of an objective.
        reads: Names of the inputs that the stage itself reads. ``required_inputs`` adds those of inner stages.
        whole_batch: Whether the stage compares rows of different groups.
        reads_contexts: Whether the result depends on tokens that the policy did not choose, so that it is not known for
            trajectories of several rows, whose contexts the rows may repeat, shorten or leave out.
        compares_prefixes: Whether the result depends on which rows had the same tokens before, so that trajectories of
            several rows need ``context_keys``.
        reads_rollouts: Whether a clip stage or a scale reads token ids, groups or rewards, which some hosts do not hand
            to their policy loss.
    """

    kind: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    whole_batch: ClassVar[bool] = False
    reads_contexts: ClassVar[bool] = False
    compares_prefixes: ClassVar[bool] = False
    reads_rollouts: ClassVar[bool] = False

    def _named(self, name: str) -> str:
        return f"{self.kind}.{type(self).__name__}: {name}" if self.kind else f"{type(self).__name__}: {name}"

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

    @cached_property
    def _adjusted(self) -> tuple[str, ...]:
        """Names of the settings in which there is a schedule or a controller."""

        def adjusts(value: Any) -> bool:
            if isinstance(value, tuple):
                return any(adjusts(x) for x in value)
            return isinstance(value, Adjustable) or (isinstance(value, Stage) and bool(value.adjustables))

        return tuple(f.name for f in fields(self) if adjusts(getattr(self, f.name)))  # type: ignore[arg-type]

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
        for stale in ("adjustables", "_adjusted"):
            made.__dict__.pop(stale, None)
        for name in self._adjusted:
            value = getattr(self, name)
            if isinstance(value, Adjustable):
                made._set(name, number(value))
            elif isinstance(value, Stage):
                object.__setattr__(made, name, value.resolved(number))
            else:  # a tuple of stages
                parts = tuple(x.resolved(number) if isinstance(x, Stage) else x for x in value)
                object.__setattr__(made, name, parts)
        return made
