"""Scores of reasoning_gym data sets, for the worker of :class:`tokcredit.rewards.bounded.BoundedCalls`."""

from __future__ import annotations

from typing import Any

import reasoning_gym

_CORRECT = 0.99
_MADE: dict[str, Any] = {}


def reward(name: str, configuration: dict[str, Any], entry: dict[str, Any], answer: str | None) -> float:
    """Return 1 if a data set scores an answer as correct, and 0 otherwise; partial credit is no credit.

    Args:
        name: Name of the data set.
        configuration: Settings of the data set.
        entry: Problem of the data set.
        answer: Text of the answer, or None.
    """
    key = repr((name, configuration))
    if key not in _MADE:
        _MADE[key] = reasoning_gym.create_dataset(name, **configuration)
    return float(_MADE[key].score_answer(answer, entry) >= _CORRECT)
