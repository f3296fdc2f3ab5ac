"""Environments that a model acts in, by text.

An environment is a class with the methods of :class:`Environment`. The trainer runs it in another process, which does
not import torch; see :mod:`tokcredit.environments.playing`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Observation(NamedTuple):
    """What an environment says at the beginning of an episode, or after a step.

    Attributes:
        text: What the model reads next.
        state: Key of the state that the environment is in now: the same text for equal states.
        reward: Reward of the step; 0 at the beginning.
        done: Whether the episode is over. The reward of that step is the outcome of the episode.
        score: Score of the state, or None if it has none.
    """

    text: str
    state: str
    reward: float = 0.0
    done: bool = False
    score: float | None = None


class Environment(Protocol):
    """A world that answers actions.

    It is deterministic: after ``reset(seed)`` the same actions are answered in the same way, also in another process,
    because an episode is played again from its beginning for each action.

    Attributes:
        introduction: Instruction before the first observation, for models with a chat template.
    """

    introduction: str

    def reset(self, seed: int) -> Observation:
        """Begin an episode and return what the model reads first.

        Args:
            seed: Chooses the world that the episode begins in.
        """

    def step(self, action: str) -> Observation:
        """Carry out an action and return its observation. A text that is no action is not an error.

        Args:
            action: What the model wrote.
        """
