"""The function that plays episodes in the worker of :class:`tokcredit.rewards.bounded.BoundedCalls`, without torch."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Sequence
from typing import Any

from tokcredit.environments import Environment, Observation


def play(path: str, settings: str, seed: int, actions: Sequence[str]) -> dict[str, Any]:
    """Return the last observation of an episode by name, and the introduction of its environment.

    Args:
        path: Import path of the class of the environment, ``package.module:Class``.
        settings: Its arguments by name, as JSON.
        seed: Seed of the episode.
        actions: The actions so far; none for the first observation.

    Raises:
        TypeError: The environment returned something other than an :class:`~tokcredit.environments.Observation`, or one
            with a value of another type.
        ValueError: A reward or a score is not finite, a text has lone surrogates, or the episode was over before the
            last action.
    """
    environment = _made(path, settings)
    seen = _checked(environment.reset(seed))
    for action in actions:
        if seen.done:
            raise ValueError("done: expected False before the last action, got True")
        seen = _checked(environment.step(action))
    return {**seen._asdict(), "introduction": environment.introduction}


@functools.cache
def _made(path: str, settings: str) -> Environment:
    module, _, name = path.partition(":")
    made: Environment = getattr(importlib.import_module(module), name)(**json.loads(settings))
    return made


def _checked(seen: Any) -> Observation:
    if not isinstance(seen, Observation):
        raise TypeError(f"observation: expected Observation, got {type(seen).__name__}")
    for name, value in (("text", seen.text), ("state", seen.state)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a text, got {type(value).__name__}")
        value.encode()  # no lone surrogates, which no tokenizer takes
    reward, score = float(seen.reward), None if seen.score is None else float(seen.score)
    if not math.isfinite(reward) or not math.isfinite(score or 0.0):
        raise ValueError(f"reward, score: expected finite numbers, got {reward}, {score}")
    return Observation(seen.text, seen.state, reward, bool(seen.done), score)
