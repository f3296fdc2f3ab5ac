"""Sources of problems: reasoning_gym data sets, JSONL files, generated problems, and environments."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tokcredit.expression import Call, call_with, parse
from tokcredit.rewards import answers, matching
from tokcredit.rewards.bounded import BoundedCalls
from tokcredit.settings import Range, nearest
from tokcredit.train import algorithms, imported, tools, worlds
from tokcredit.train.judging import BoundedReward
from tokcredit.train.problems import Message, Problem, Problems, split
from tokcredit.train.records import Record, messages, of_file

_Count = Annotated[int, Range("whole number", at_least=1)]
_REWARDS = Path(answers.__file__).parent


@functools.cache
def _bounded(file: str) -> BoundedCalls:
    """Return the calls of the function ``reward`` of a file, which all tasks of this process share."""
    return BoundedCalls(_REWARDS / file, "reward")


def _reasoning_gym(call: Call, seed: int) -> list[Problem]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if call.name not in DATASETS:
        got = f"{call.name!r}{nearest(call.name, (*_TASKS, *DATASETS))}"
        raise ValueError(f"tasks: expected {', '.join(_TASKS)} or a reasoning_gym data set, got {got}")
    if call.positional:
        raise ValueError(f"tasks: expected {call.name}(key=value, ...), got positional arguments")
    known = [f.name for f in dataclasses.fields(DATASETS[call.name][1])]
    if unknown := [name for name in call.named if name not in known]:
        expected, hint = f"settings among {', '.join(known)}", nearest(unknown[0], known)
        raise ValueError(f"tasks: {call.name}: expected {expected}, got {unknown[0]}{hint}")
    configuration = {"size": 2000, "seed": seed, **call.named}
    try:
        data = list(reasoning_gym.create_dataset(call.name, **configuration))
    except Exception as error:  # the data sets check their settings each in its own way
        given = ", ".join(f"{name}={value!r}" for name, value in configuration.items())
        reason = str(error) or type(error).__name__
        raise ValueError(f"tasks: {call.name}: expected settings that it takes, got {given}: {reason}") from error
    scored = functools.partial(BoundedReward, _bounded("gym_scores.py"))

    def problem(entry: dict[str, Any]) -> Problem:
        answer = str(entry["answer"])
        said = _judged_number if answers.is_number(answer) else answers.judged
        return Problem(call.name, entry["question"], answer, scored((call.name, configuration, entry), said))

    return [problem(entry) for entry in data]


def _judged_number(response: str) -> str | None:
    return answers.last_number(answers.judged(response))


class _Line(NamedTuple):
    """A line of a JSONL file: where it is, and its question and answer."""

    place: str
    question: str
    answer: str
    messages: tuple[Message, ...]

    def problem(self, path: str, reward: Callable[[str], Any]) -> Problem:
        return Problem(Path(path).stem, self.question, self.answer, reward, None, self.messages)


def _lines(path: str) -> Iterator[_Line]:
    """Yield the prompt and the answer of each line of a JSONL file."""
    return map(_line, of_file("tasks", path, ("prompt", "answer")))


def _line(record: Record) -> _Line:
    prompt, answer = record.values["prompt"], record.values["answer"]
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not (is_number or (isinstance(answer, str) and answer.strip())):
        raise record.expected("tasks", "an answer that is a text or a number", repr(answer))
    if isinstance(prompt, str) and prompt.strip():
        return _Line(record.place, prompt, str(answer), ())
    chat = messages(prompt)
    if chat is None or chat[-1].role == "assistant":
        what = "a prompt that is a text, or messages [{'role', 'content'}, ...] of texts that do not end with assistant"
        raise record.expected("tasks", what, f"{str(prompt)[:100]!r}")
    question = chat[0].content if len(chat) == 1 else "\n\n".join(f"{m.role}: {m.content}" for m in chat)
    return _Line(record.place, question, str(answer), chat)


def _jsonl(path: str) -> list[Problem]:
    """Return the problems of a JSONL file, whose answers are compared as mathematics: 1/2 equals 0.5."""
    if find_spec("math_verify") is None:
        raise ImportError('tasks: jsonl needs math-verify: pip install "tokcredit[train]"')
    calls = _bounded("mathematics.py")
    return [line.problem(path, BoundedReward(calls, (line.answer,), answers.judged)) for line in _lines(path)]


def _choices(path: str) -> list[Problem]:
    """Return the problems of a JSONL file with capital letters as answers; see :func:`matching.options`."""

    def reward(true: frozenset[str], response: str) -> float:
        return matching.options(answers.last_options(answers.judged(response)), true)

    def problem(line: _Line) -> Problem:
        true = answers.last_options(line.answer)
        if not true:
            raise ValueError(f"tasks: {line.place}: expected an answer of capital letters, got {line.answer!r}")
        return line.problem(path, functools.partial(reward, true))

    return [problem(line) for line in _lines(path)]


def _addition(digits: _Count = 2, size: _Count = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``47+85=``; the last number of a response is compared with the sum."""
    generator = random.Random(seed)

    def reward(answer: str, response: str) -> float:
        return float(_judged_number(response) == answer)

    problems = []
    for _ in range(size):
        a, b = (generator.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        answer = str(a + b)
        problems.append(Problem("addition", f"{a}+{b}=", answer, functools.partial(reward, answer)))
    return problems


def _sums(terms: _Count = algorithms.SIZES["sums"], size: _Count = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``7+5+8=``; see :func:`algorithms.sums`."""
    return _drawn("sums", terms, size, seed)


def _letters(length: _Count = algorithms.SIZES["letters"], size: _Count = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``abba:b=``; see :func:`algorithms.letters`."""
    return _drawn("letters", length, size, seed)


def _drawn(kind: str, steps: int, size: int, seed: int) -> list[Problem]:
    """Return problems of a kind; the last number of a response is compared."""
    generator = random.Random(seed)

    def reward(answer: str, response: str) -> float:
        return float(_judged_number(response) == answer)

    solved = (algorithms.DRAWS[kind](generator, steps, algorithms.never) for _ in range(size))
    return [Problem(kind, x.question, x.answer, functools.partial(reward, x.answer)) for x in solved]


def _calculator(operations: _Count = 2, digits: _Count = 1, size: _Count = 2000, seed: int = 0) -> list[Problem]:
    """Return problems such as ``(7+5)*3=`` for a model that calls a calculator; ``<answer>`` is compared."""
    generator = random.Random(seed)

    def reward(answer: str, response: str) -> float:
        return float(answers.tagged(response) == answer)

    problems = []
    for _ in range(size):
        question, calls, answer = tools.chain(generator, operations, digits)
        judge = functools.partial(reward, answer)
        problems.append(Problem("calculator", question, answer, judge, tuple(calls), introduction=tools.INTRODUCTION))
    return problems


_TASKS: dict[str, Callable[..., list[Problem]]] = {
    "jsonl": _jsonl,
    "choices": _choices,
    "addition": _addition,
    "sums": _sums,
    "letters": _letters,
    "calculator": _calculator,
    **worlds.TASKS,
}
_GENERATED = ("addition", "sums", "letters", "calculator", *worlds.TASKS)


def _problems(text: str, seed: int) -> list[Problem]:
    if file := re.fullmatch(r"(?:(\w+)\()?([^'\"()]+\.jsonl?)\)?", text.strip()):
        raise ValueError(f"tasks: expected a path in quotes, {file[1] or 'jsonl'}('{file[2]}'), got {text}")
    call = parse(text, "tasks")
    if call.name not in _TASKS:
        return _reasoning_gym(call, seed)
    seeded = {"seed": seed, **call.named} if call.name in _GENERATED else call.named
    return list(call_with(_TASKS, call._replace(named=seeded), "tasks"))


def load(tasks: Sequence[str], held_out: float, reward: str | None = None, seed: int = 0) -> Problems:
    """Return the distinct problems of some tasks, split into training and held-out problems by :func:`split`.

    Args:
        tasks: Tasks with their settings, as in :class:`~tokcredit.train.settings.Settings`.
        held_out: Share of the sets of numbers (or of the texts) that is kept from training.
        reward: Import path of a reward function, or None for the rewards of the tasks.
        seed: Seed of generated problems.

    Raises:
        ValueError: A task is unknown, a file is malformed, or one side has no problems.
    """
    if not tasks:
        raise ValueError(
            "tasks: expected at least one, because the model has no default, got none; for example addition"
        )
    function = None if reward is None else imported.function(reward, "reward", ("prompt", "response", "answer"))
    train, measured = [], []
    for text in tasks:
        distinct: dict[Any, Problem] = {p.world or p.question: p for p in _problems(text, seed)}
        in_worlds = any(p.world for p in distinct.values())
        if function is not None:
            if in_worlds:
                raise ValueError(f"reward: expected None because episodes of {text} have rewards, got {reward}")
            for key, p in distinct.items():
                distinct[key] = p._replace(reward=functools.partial(_swapped, function, p.question, p.answer))
        if len(distinct) < 2:
            raise ValueError(f"tasks: expected at least two different problems of {text}, got {len(distinct)}")
        own, kept = (worlds.split if in_worlds else split)(list(distinct.values()), held_out)
        train.append(own)
        measured += kept
    if not all(train) or not measured:
        raise ValueError(f"held_out: expected a share that leaves problems on both sides, got {held_out} of {tasks}")
    return Problems(train, measured)


def _swapped(function: Callable[[str, str, str], Any], question: str, answer: str, response: str) -> Any:
    return function(question, response, answer)
