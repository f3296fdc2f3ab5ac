"""Rewards of responses, and what happens where a reward function has none."""

from __future__ import annotations

import logging
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from tokcredit.rewards.bounded import BoundedCalls, Failure
from tokcredit.train.problems import Problem

OnRewardError = Literal["stop", "zero", "drop"]

_LOG = logging.getLogger(__name__)
_SHOWN = 200
_PACKAGE = Path(__file__).parents[1]


class RewardError(RuntimeError):
    """A reward function raised an error, or returned something other than one finite number."""


@dataclass(frozen=True)
class BoundedReward:
    """A reward function whose calls have limits of time and memory. A response that exceeds them has reward 0.

    Args:
        calls: Calls of a function of the arguments and of what a response says.
        arguments: Arguments of the function, without the last.
        said: Function from a response to the last argument.
    """

    calls: BoundedCalls
    arguments: tuple[Any, ...]
    said: Callable[[str], str | None]

    def __call__(self, response: str) -> float:
        """Return the reward of a response.

        Args:
            response: Text of the response.
        """
        (result,) = self.calls([self.call(response)])
        return 0.0 if isinstance(result, Failure) else result

    def call(self, response: str) -> tuple[Any, ...]:
        """Return the arguments of the call that judges a response.

        Args:
            response: Text of the response.
        """
        return (*self.arguments, self.said(response))


class Judging:
    """Computes rewards, counts those that could not be computed, and logs each of them.

    Args:
        on_error: What happens where a reward function raises an error or returns no finite number: ``stop`` raises
            :class:`RewardError`, ``zero`` makes the reward 0, ``drop`` makes it NaN. A response that exceeds the limits
            of a :class:`BoundedReward` has reward 0 in any case.

    Raises:
        ValueError: ``on_error`` is another text.
    """

    def __init__(self, on_error: OnRewardError = "stop") -> None:
        if on_error not in get_args(OnRewardError):
            raise ValueError(f"on_reward_error: expected {', '.join(get_args(OnRewardError))}, got {on_error!r}")
        self._on_error = on_error
        self._failures = 0
        self._traceback_shown = False

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """Return the reward of each response.

        Args:
            problems: Problem of each response.
            responses: Texts.

        Raises:
            RewardError: A reward function failed and ``on_error`` is ``stop``.
        """
        rewards = [math.nan] * len(problems)
        together: dict[BoundedCalls, dict[int, tuple[Any, ...]]] = {}
        for i, (problem, response) in enumerate(zip(problems, responses, strict=True)):
            if isinstance(problem.reward, BoundedReward):
                together.setdefault(problem.reward.calls, {})[i] = problem.reward.call(response)
            else:
                rewards[i] = self._own(problem, response)
        for calls, arguments in together.items():
            for i, result in zip(arguments, calls(list(arguments.values())), strict=True):
                if isinstance(result, Failure):
                    self._failed(f"reward: {result.reason}; the reward is 0{_where(problems[i], responses[i])}")
                    rewards[i] = 0.0
                else:
                    rewards[i] = result
        return rewards

    def replaced(self, message: str, trace: str = "") -> float:
        """Return what takes the place of a reward that could not be computed, after logging it: 0, or NaN.

        Args:
            message: What happened, and where.
            trace: Traceback, which is logged the first time, or nothing.

        Raises:
            RewardError: ``on_error`` is ``stop``.
        """
        if self._on_error == "stop":
            raise RewardError(f"{message}\n{trace}" if trace else message) from None  # the message has the traceback
        if trace and not self._traceback_shown:
            message, self._traceback_shown = f"{message}\n{trace}", True
        self._failed(message)
        return math.nan if self._on_error == "drop" else 0.0

    def failures(self) -> int:
        """Return the number of rewards that could not be computed since the last call of this method."""
        count, self._failures = self._failures, 0
        return count

    def _own(self, problem: Problem, response: str) -> float:
        try:
            value = problem.reward(response)
        except Exception as error:
            trace = "".join(traceback.format_exception(error.with_traceback(_outside(error.__traceback__)))).rstrip()
            return self.replaced(f"reward: {type(error).__name__}: {error}{_where(problem, response)}", trace)
        if (number := _number(value)) is not None:
            return number
        return self.replaced(f"reward: expected one finite number, got {_written(value)}{_where(problem, response)}")

    def _failed(self, message: str) -> None:
        self._failures += 1
        _LOG.warning("%s", message)


def _outside(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins outside of this package, or all of it if none does."""
    rest = trace
    while rest is not None and Path(rest.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE):
        rest = rest.tb_next
    return rest or trace


def _number(value: Any) -> float | None:
    """Return a finite number as a float, and None for everything else; arrays of one number without axes count."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _written(value: Any) -> str:
    """Return the text of a value, or its type where it has none, as an integer of 10,000 digits."""
    try:
        return f"{value!r:.{_SHOWN}}"
    except Exception:
        return f"a value of type {type(value).__name__}"


def _where(problem: Problem, response: str) -> str:
    return f"\n  prompt: {problem.question!r:.{_SHOWN}}\n  reply: {response!r:.{_SHOWN}}"
