"""Tasks with verifiable answers: reasoning_gym data sets, JSONL files, column addition, and chains for a calculator."""

from __future__ import annotations

import functools
import importlib
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokcredit.expression import Call, parse
from tokcredit.rewards import matching
from tokcredit.train import tools

_NUMBER = re.compile(r"(?<![\w)])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.S)
_OPTION = re.compile(r"\b[A-Z]\b")
_LAST_OPTIONS = re.compile(r"(?:\b[A-Z]\b[\s,;&]*(?:and\s+)?)+[.!)]*\s*$")
_CORRECT = 0.99


class Problem(NamedTuple):
    """A question with its answer.

    Attributes:
        task: Name of the task.
        question: Text of the question.
        answer: Text of the answer.
        reward: Function from a response to its reward.
        calls: Expected tool calls, or None for a task without tools.
    """

    task: str
    question: str
    answer: str
    reward: Callable[[str], float]
    calls: tuple[matching.Call, ...] | None = None


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
        return [self._nth(step * count + i, seed) for i in range(count)]

    def measured(self, count: int) -> list[Problem]:
        """Return held-out problems, evenly spaced.

        Args:
            count: Largest number of problems.
        """
        count = min(len(self.held_out), count)
        return [self.held_out[i * len(self.held_out) // count] for i in range(count)]

    def _nth(self, n: int, seed: int) -> Problem:
        task, n = n % len(self.train), n // len(self.train)
        problems = self.train[task]
        turn, at = divmod(n, len(problems))
        return problems[_order(len(problems), f"{seed}-{task}-{turn}")[at]]


@functools.lru_cache(maxsize=64)
def _order(size: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(size), size)


def tagged(response: str) -> str | None:
    """Return the content of the last ``<answer>`` of a response, or None without one.

    Args:
        response: Text of the response.
    """
    tags = _TAG.findall(response)
    return str(tags[-1]).strip() if tags else None


def final_answer(response: str, numeric: bool) -> str | None:
    """Return the final answer of a response: its last ``<answer>``, else its last number, or the whole response.

    Args:
        response: Text of the response.
        numeric: Whether the answer is a number. Without ``<answer>`` the result is then the last number, or None.
    """
    if (answer := tagged(response)) is not None:
        return answer
    if not numeric:
        return response.strip()
    numbers = _NUMBER.findall(response)
    return numbers[-1].replace(",", "") if numbers else None


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _reasoning_gym(call: Call, seed: int) -> list[Problem]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if call.name not in DATASETS:
        raise ValueError(
            f"tasks: expected jsonl, choices, addition, calculator or a reasoning_gym data set, got {call.name!r}"
        )
    if call.positional:
        raise ValueError(f"tasks: expected {call.name}(key=value, ...), got positional arguments")
    try:
        data = reasoning_gym.create_dataset(call.name, **{"size": 2000, "seed": seed, **call.named})
    except (TypeError, AssertionError) as error:
        raise ValueError(f"tasks: {call.name}: {error}") from None

    def reward(entry: dict[str, Any], response: str) -> float:
        answer = final_answer(response, _is_number(str(entry["answer"])))
        return float(data.score_answer(answer, entry) >= _CORRECT)

    return [
        Problem(call.name, entry["question"], str(entry["answer"]), functools.partial(reward, entry)) for entry in data
    ]


def _lines(path: str) -> list[tuple[str, str]]:
    """Return the prompt and the answer of each line of a JSONL file."""
    pairs = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pairs.append((str(record["prompt"]), str(record["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"tasks: {path}:{number}: expected {{'prompt', 'answer'}}, got {error!r}") from None
    return pairs


def _jsonl(path: str) -> list[Problem]:
    """Return the problems of a JSONL file, whose answers are compared as mathematics: 1/2 equals 0.5."""
    from math_verify import parse as parse_math
    from math_verify import verify

    def reward(gold: Any, response: str) -> float:
        tag = tagged(response)
        answer = parse_math(response if tag is None else tag, parsing_timeout=None)
        return float(verify(gold, answer, timeout_seconds=None))

    return [
        Problem(
            Path(path).stem,
            question,
            answer,
            functools.partial(reward, parse_math(f"${answer}$", parsing_timeout=None)),
        )
        for question, answer in _lines(path)
    ]


def _choices(path: str) -> list[Problem]:
    """Return the problems of a JSONL file with capital letters as answers; see :func:`matching.options`."""

    def reward(true: frozenset[str], response: str) -> float:
        tags = _TAG.findall(response)
        last = _LAST_OPTIONS.search(tags[-1] if tags else response)
        return matching.options(set(_OPTION.findall(last.group())) if last else set(), true)

    return [
        Problem(Path(path).stem, question, answer, functools.partial(reward, frozenset(_OPTION.findall(answer))))
        for question, answer in _lines(path)
    ]


def _addition(digits: int = 2, size: int = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``47+85=``; the last number of a response is compared with the sum."""
    generator = random.Random(seed)

    def reward(answer: str, response: str) -> float:
        return float(final_answer(response, numeric=True) == answer)

    problems = []
    for _ in range(size):
        a, b = (generator.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        answer = str(a + b)
        problems.append(Problem("addition", f"{a}+{b}=", answer, functools.partial(reward, answer)))
    return problems


def _calculator(operations: int = 2, digits: int = 1, size: int = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``(7+5)*3=`` for a model that calls a calculator; ``<answer>`` is compared."""
    generator = random.Random(seed)

    def reward(answer: str, response: str) -> float:
        return float(tagged(response) == answer)

    problems = []
    for _ in range(size):
        question, calls, answer = tools.chain(generator, operations, digits)
        problems.append(Problem("calculator", question, answer, functools.partial(reward, answer), tuple(calls)))
    return problems


def _problems(text: str, seed: int) -> list[Problem]:
    call = parse(text, "tasks")
    if call.name == "jsonl":
        return _jsonl(*call.positional, **call.named)
    if call.name == "choices":
        return _choices(*call.positional, **call.named)
    if call.name == "addition":
        return _addition(*call.positional, **{"seed": seed, **call.named})
    if call.name == "calculator":
        return _calculator(*call.positional, **{"seed": seed, **call.named})
    return _reasoning_gym(call, seed)


def imported_reward(path: str) -> Callable[[str, str, str], float]:
    """Return a reward function of (prompt, response, answer).

    Args:
        path: ``package.module:function``.

    Raises:
        ValueError: The path has no colon.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"reward: expected package.module:function, got {path!r}")
    return getattr(importlib.import_module(module), name)


def load(tasks: Sequence[str], held_out: float, reward: str | None = None, seed: int = 0) -> Problems:
    """Return the distinct problems of some tasks, split into training and held-out problems.

    Problems with the same numbers, in any order and of any task, are on the same side: ``3 + 4`` is not measured after
    ``4 + 3`` or ``3 * 4`` was trained. Questions without numbers are split by their text.

    Args:
        tasks: Tasks with their settings, as in :class:`~tokcredit.train.settings.Settings`.
        held_out: Share of the sets of numbers (or of the texts) that is kept from training.
        reward: Import path of a reward function, or None for the rewards of the tasks.
        seed: Seed of generated problems.

    Raises:
        ValueError: A task is unknown, a file is malformed, or one side has no problems.
    """
    train, measured = [], []
    for text in tasks:
        distinct = {p.question: p for p in _problems(text, seed)}
        if reward is not None:
            function = imported_reward(reward)
            for question, p in distinct.items():
                distinct[question] = p._replace(reward=functools.partial(_swapped, function, question, p.answer))
        kept = {question for question in distinct if _share(question) < held_out}
        train.append([p for question, p in distinct.items() if question not in kept])
        measured += [distinct[question] for question in distinct if question in kept]
    if not tasks or not all(train) or not measured:
        raise ValueError(f"held_out: expected a share that leaves problems on both sides, got {held_out} of {tasks}")
    return Problems(train, measured)


def _swapped(function: Callable[[str, str, str], float], question: str, answer: str, response: str) -> float:
    return float(function(question, response, answer))


def _share(question: str) -> float:
    numbers = sorted(re.findall(r"\d+", question))
    return zlib.crc32((" ".join(numbers) if numbers else question).encode()) / 2**32
