"""How far a run of TRL is, for the schedules of an objective."""

from __future__ import annotations

from typing import Any


def progress(objective: Any, state: Any) -> float | None:
    """Return the finished share of the optimizer steps, from 0 to 1, or None if the objective has no schedule.

    Args:
        objective: The objective.
        state: The ``TrainerState`` of the host.
    """
    return min(state.global_step / max(state.max_steps, 1), 1.0) if objective.is_scheduled else None
