"""Problems: questions with answers and rewards, and which of them a step trains on."""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from tokcredit.rewards import matching

T = TypeVar("T")


class Asked(Protocol):
    """What has a question."""

    @property
    def question(self) -> str:
        """Text of the question."""


Q = TypeVar("Q", bound=Asked)


class Message(NamedTuple):
    """A message of a chat.

    Attributes:
        role: Who says it: ``system``, ``user``, ``assistant``, ...
        content: Its text.
    """

    role: str
    content: str


class World(NamedTuple):
    """Where the episodes about a problem begin.

    Attributes:
        name: Environment as the user named it.
        path: Import path of its class.
        settings: Arguments of the class, as JSON.
        seed: Seed of the episodes.
        state: Key of the state that they begin in.
    """

    name: str
    path: str
    settings: str
    seed: int
    state: str = ""

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


class Problem(NamedTuple):
    """A question with its answer.

    Attributes:
        task: Name of the task.
        question: Text of the question.
        answer: Text of the answer.
        reward: Function from a response to its reward.
        calls: Expected tool calls, or None for a task without tools.
        messages: Messages of a chat that ask the question, or empty if the question is one message of the user.
        introduction: Instruction before the question, for models with a chat template.
        world: Where the episodes about the problem begin, or None for a task without an environment. The question is
            then the first observation, and rewards come from the environment.
    """

    task: str
    question: str
    answer: str
    reward: Callable[[str], Any]
    calls: tuple[matching.Call, ...] | None = None
    messages: tuple[Message, ...] = ()
    introduction: str = ""
    world: World | None = None

    def again(self, response: str, request: str) -> Problem:
        """Return the problem asked once more, after a response to it.

        Args:
            response: Text of the response.
            request: What follows the response.
        """
        more = (Message("assistant", response), Message("user", request)) if self.messages else ()
        question = "\n\n".join((self.question, response, request))
        return self._replace(question=question, messages=(*self.messages, *more))


class Problems(NamedTuple):
    """The problems of a run.

    Attributes:
        train: Training problems of each task.
        held_out: Problems that are kept from training.
    """

    train: list[list[Problem]]
    held_out: list[Problem]

    def step(self, step: int, count: int, seed: int) -> list[Problem]:
        """Return the problems of a step. Tasks alternate, and each gives all its problems in random order, then again.

        Args:
            step: Number of the step, from 0.
            count: Number of problems.
            seed: Seed of the order.
        """
        return nth(self.train, range(step * count, (step + 1) * count), seed)

    def measured(self, count: int) -> list[Problem]:
        """Return held-out problems, evenly spaced.

        Args:
            count: Largest number of problems.
        """
        return spaced(self.held_out, count)


def nth(sources: Sequence[Sequence[T]], numbers: Iterable[int], seed: int) -> list[T]:
    """Return items of sources in turn, each of which gives all its items in random order, then again.

    Args:
        sources: The sources.
        numbers: Numbers of the items, from 0.
        seed: Seed of the order.
    """
    out = []
    for number in numbers:
        source, n = number % len(sources), number // len(sources)
        turn, at = divmod(n, len(sources[source]))
        out.append(sources[source][_order(len(sources[source]), f"{seed}-{source}-{turn}")[at]])
    return out


def spaced(items: Sequence[T], count: int) -> list[T]:
    """Return items that are evenly spaced.

    Args:
        items: The items.
        count: Largest number of items.
    """
    count = min(len(items), count)
    return [items[i * len(items) // count] for i in range(count)]


@functools.lru_cache(maxsize=64)
def _order(size: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(size), size)


def split(problems: Sequence[Q], held_out: float) -> tuple[list[Q], list[Q]]:
    """Return training and held-out problems.

    Problems with the same numbers, in any order and of any task, are on the same side: ``3 + 4`` is not measured after
    ``4 + 3`` or ``3 * 4`` was trained. Questions without numbers are split by their text. So are all questions of a
    task whose numbers would leave no problem on one side, for example because they all hold the same number.

    Args:
        problems: Problems of a task.
        held_out: Share of the sets of numbers, or of the texts, that is kept from training.
    """
    sides: tuple[list[Q], list[Q]] = ([], [])
    for key in (_numbers, str):
        sides = ([], [])
        for p in problems:
            sides[zlib.crc32(key(p.question).encode(errors="surrogatepass")) / 2**32 < held_out].append(p)
        if all(sides):
            break
    return sides


def _numbers(question: str) -> str:
    numbers = sorted(re.findall(r"\d+", question))
    return " ".join(numbers) if numbers else question
