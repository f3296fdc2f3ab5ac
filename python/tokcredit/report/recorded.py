"""Objectives whose required inputs a file does not hold, shown with the advantages that the trainer wrote."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from tokcredit.report.readers import RECORDED, Run
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import Stage
from tokcredit.stages.credit import Credit
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class recorded(Credit):
    """The advantages in the file."""

    reads: ClassVar[frozenset[str]] = frozenset({RECORDED})

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the advantages, float ``[N]``.

        Args:
            batch: The rollouts, with ``recorded_advantages``.
        """
        return batch.input(RECORDED)


@dataclass(frozen=True)
class recorded_weight(TokenWeight):
    """The absolute advantages in the file, for objectives whose advantages are their token weights."""

    reads: ClassVar[frozenset[str]] = frozenset({RECORDED})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return the weights, float ``[N]``.

        Args:
            batch: The rollouts, with ``recorded_advantages``.
            advantages: Not read.
        """
        return batch.input(RECORDED).abs()


def missing(objective: Stage, run: Run) -> list[str]:
    """Return the names of the inputs that an objective reads and a run does not carry, sorted.

    Args:
        objective: The objective.
        run: The run.
    """
    return [name for name in sorted(objective.required_inputs) if not run.batch.has_input(name)]


def as_recorded(name: str, objective: Any, run: Run) -> tuple[Any, list[str]]:
    """Return an objective as far as the run carries its required inputs, and a note if that is not all of it.

    The advantages become those that the trainer wrote. Other stages whose inputs are missing are left out. An objective
    whose inputs the run carries, or a run without the trainer's advantages, changes nothing.

    Args:
        name: Name of the objective, for the note.
        objective: The objective.
        run: The run.
    """
    lacks = frozenset(missing(objective, run))
    if not lacks or run.advantages is None:
        return objective, []
    settings = {f.name: getattr(objective, f.name) for f in fields(objective)}
    defaults = type(objective)()
    changes: dict[str, Any] = {}
    for kind, value in settings.items():
        if isinstance(value, tuple):
            kept = tuple(stage for stage in value if not lacks & stage.required_inputs)
            changes |= {kind: kept} if kept != value else {}
        elif isinstance(value, Stage):
            neutral = clip.unclipped() if kind == "clip" else getattr(defaults, kind)
            changes |= {kind: neutral} if lacks & value.required_inputs else {}
        elif value in lacks:
            changes[kind] = None
    left_out = sorted(changes.keys() - {"credit"})
    if "credit" in settings:
        changes["credit"] = recorded()
    else:
        changes["token_weights"] = (recorded_weight(),)
    note = f"{name} reads {', '.join(sorted(lacks))}, which the file does not have: it is shown with the advantages "
    note += "that the trainer wrote" + (f", and without its own {', '.join(left_out)}." if left_out else ".")
    return replace(objective, **changes), [note]
