"""What every stage choice can say about itself: the evidence it needs, how far it looks, whether it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

from tokcredit.schedule import Schedule

T = TypeVar("T")


def _parts(x: Any) -> Iterator[Any]:
    """A choice's settings, and the elements of those that are tuples."""
    for f in fields(x):
        value = getattr(x, f.name)
        yield from value if isinstance(value, tuple) else (value,)


class Choice:
    """Base of stage choices, which are frozen dataclasses. Choices among the settings count as part of it.

    Attributes:
        reads: names of the evidence that the choice itself reads; see :mod:`tokcredit.evidence`.
        whole_batch: whether it compares rows of different groups.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    whole_batch: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the evidence a batch must carry."""
        return self.reads.union(*(getattr(part, "needs", ()) for part in _parts(self)))

    @property
    def spans_groups(self) -> bool:
        """Whether the result for a row depends on other groups, so that it must see the rows of all ranks."""
        return self.whole_batch or any(getattr(part, "spans_groups", False) for part in _parts(self))

    @property
    def is_scheduled(self) -> bool:
        """Whether a setting changes during training."""
        return any(
            isinstance(part, Schedule) or (isinstance(part, Choice) and part.is_scheduled) for part in _parts(self)
        )

    def at(self: T, progress: float) -> T:
        """The same with every schedule replaced by its number.

        Args:
            progress: 0 at the first step, 1 at the last.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number from 0 to 1, got {progress}")
        return _at(self, progress)


def _at(x: Any, progress: float) -> Any:
    if isinstance(x, Schedule):
        return x(progress)
    if isinstance(x, tuple):
        return tuple(_at(part, progress) for part in x)
    if isinstance(x, Choice) and is_dataclass(x) and x.is_scheduled:
        return replace(x, **{f.name: _at(getattr(x, f.name), progress) for f in fields(x)})
    return x
