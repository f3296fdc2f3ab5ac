"""Methods whose evidence a file does not hold, shown with the advantages that their trainer wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tokcredit.stages import clip
from tokcredit.stages.base import Stage
from tokcredit.report.readers import Run
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts


@dataclass(frozen=True)
class recorded(Stage):
    """The advantages of the file."""

    reads: ClassVar[frozenset[str]] = frozenset({"advantages"})

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.input("advantages")


def missing(objective: Objective, run: Run) -> list[str]:
    """Names of the evidence that the objective needs and the run does not carry."""
    batch = run.batch
    return [name for name in sorted(objective.required_inputs) if getattr(batch, name, None) is None and name not in batch.extras]


def as_recorded(name: str, objective: Objective, run: Run) -> tuple[Objective, list[str]]:
    """The objective as far as the run carries its evidence, and a note if that is not all of it.

    The credit becomes the trainer's own advantages; other stages whose evidence is missing are left out.
    """
    lacks = missing(objective, run)
    if not lacks or run.advantages is None:
        return objective, []

    def known(stage: Stage) -> bool:
        return not stage.required_inputs & set(lacks)

    shown = replace(
        objective,
        credit=recorded(),
        weights=tuple(weight for weight in objective.weights if known(weight)),  # type: ignore[arg-type]
        clip=objective.clip if known(objective.clip) else clip.unclipped(),  # type: ignore[arg-type]
        gain=objective.gain if objective.gain is not None and known(objective.gain) else None,  # type: ignore[arg-type]
        sampling=None,
        kl=None,
    )
    note = f"{name} needs {', '.join(lacks)}, which the file does not hold: its advantages are those the trainer wrote."
    left_out = [
        stage for stage in ("weights", "clip", "gain", "sampling") if getattr(shown, stage) != getattr(objective, stage)
    ]
    return shown, [note + (f" Left out: {', '.join(left_out)}." if left_out else "")]
