"""What an objective asks of a host trainer, and how a host that lacks it refuses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tokcredit import methods
from tokcredit.stages import token_score
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts


@dataclass(frozen=True)
class given(token_score.given):
    """What the host computed, ``[R, 1]`` or ``[N]``, as a credit or a weight (bool selects)."""

    def __call__(self, batch: Rollouts, advantages: Tensor | None = None) -> Tensor:
        return super().__call__(batch)


def chosen(method: str | None, objective: Objective | None) -> Objective:
    """The objective, given itself or by the name of a method.

    Raises:
        TypeError: both are given, or neither.
    """
    if (method is None) == (objective is None):
        raise TypeError(
            f"method, objective: expected exactly one of them, got {'neither' if method is None else 'both'}"
        )
    return methods.load(method) if method is not None else objective  # type: ignore[return-value]


def require(objective: Objective, carries: Collection[str], host: str) -> None:
    """Checks that the host carries everything that the objective's stages read.

    Raises:
        ValueError: it does not; the message names the stage.
    """
    if objective.variable != "log_probs":
        raise ValueError(
            f"objective: expected variable log_probs, which {host} gives the loss, got {objective.variable}"
        )
    for stage in fields(objective):
        choice = getattr(objective, stage.name)
        for part in choice if isinstance(choice, tuple) else (choice,):
            for name in sorted(set(getattr(part, "needs", ())) - set(carries)):
                raise ValueError(
                    f"objective: expected a {stage.name} stage that reads no more than {host} carries "
                    f"({', '.join(sorted(carries))}), got {part!r}, which needs {name}"
                )


def untouched(settings: Any, kind: type, decided: Mapping[str, str], host: str) -> None:
    """Checks that the host's own settings have their defaults wherever the objective decides.

    Args:
        settings: the host's configuration.
        kind: the dataclass that holds its defaults.
        decided: the reason by name of setting; names that this version of the host does not have are skipped.
        host: its name, for the message.

    Raises:
        ValueError: a setting was changed that would otherwise be ignored.
    """
    for setting in fields(kind):
        if setting.name not in decided:
            continue
        if (value := getattr(settings, setting.name)) != setting.default:
            reason = decided[setting.name]
            expected = f"{host}'s default {setting.default!r}, because {reason}"
            raise ValueError(f"{setting.name}: expected {expected}, got {value!r}")
