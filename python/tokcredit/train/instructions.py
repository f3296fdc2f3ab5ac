"""Examples of :func:`tokcredit.methods.mapl`: pairs under prompts with instructions that can be checked on a text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tokcredit.train.examples import Example, Response, RevisedPrompts
from tokcredit.train.prompts import filled
from tokcredit.train.settings import Settings


class Instruction(NamedTuple):
    """What a response is asked for.

    Attributes:
        text: The instruction.
        holds: Returns whether a response follows it.
    """

    text: str
    holds: Callable[[str], bool]


def instructions(texts: Sequence[str]) -> list[Instruction]:
    """Return instructions about length, words, beginning and end.

    Every text follows at least one of them, and does not follow at least one.

    Args:
        texts: The responses.
    """
    found: list[Instruction] = []
    for unit, count in (("words", _words), ("characters", len)):
        sizes = sorted({count(text) for text in texts})
        at_least, at_most = [*sizes, sizes[-1] + 1], [*range(max(sizes[0] - 1, 0), sizes[0]), *sizes]
        found += [Instruction(f"Use at least {n} {unit}.", partial(_at_least, count, n)) for n in at_least]
        found += [Instruction(f"Use at most {n} {unit}.", partial(_at_most, count, n)) for n in at_most]
    for word in sorted({word for text in texts for word in text.split()}):
        found += [
            Instruction(f"Use the word {word}.", partial(_contains, word)),
            Instruction(f"Do not use the word {word}.", partial(_avoids, word)),
            Instruction(f"Begin with the word {word}.", partial(_begins, word)),
            Instruction(f"End with the word {word}.", partial(_ends, word)),
        ]
    return found


def _words(text: str) -> int:
    return len(text.split())


def _at_least(count: Callable[[str], int], n: int, text: str) -> bool:
    return count(text) >= n


def _at_most(count: Callable[[str], int], n: int, text: str) -> bool:
    return count(text) <= n


def _contains(word: str, text: str) -> bool:
    return word in text.split()


def _avoids(word: str, text: str) -> bool:
    return word not in text.split()


def _begins(word: str, text: str) -> bool:
    return text.split()[:1] == [word]


def _ends(word: str, text: str) -> bool:
    return text.split()[-1:] == [word]


class Levels(NamedTuple):
    """Examples of all levels.

    Attributes:
        examples: The pairs, each followed by those that are made of it.
        notes: What was left out, for the user.
    """

    examples: list[Example]
    notes: list[str]


def levels(pairs: Iterable[Example], settings: Settings, tokenizer: Any, prefix: Sequence[int], longest: int) -> Levels:
    """Return pairs of responses, each followed by pairs of prompts and a group of four that are made of it.

    Instructions are drawn from :func:`instructions` of both responses. For a response, the better prompt has
    instructions that it follows, and in the worse one some of them are replaced by others that it does not follow. In a
    group of four, the instructions of the second prompt are those that the chosen response follows and the rejected one
    does not. What cannot be made, or is too long for the model, is left out.

    Args:
        pairs: Pairs of a chosen and a rejected response.
        settings: Settings of the run.
        tokenizer: Tokenizer of the model.
        prefix: Token ids that stand before every prompt.
        longest: Largest number of tokens of prompt and response, or 0 for no limit.
    """
    made = _Maker(settings, tokenizer, prefix)
    out: list[Example] = []
    left_out = 0
    for number, pair in enumerate(pairs):
        groups = made.of_pair(pair, random.Random(f"{settings.seed}:{number}"))
        fitting = [x for x in groups if not longest or _size(x) <= longest]
        out += [pair, *fitting]
        left_out += _GROUPS - len(fitting)
    what = "groups with instructions left out because they are too long, or the responses follow the same ones"
    return Levels(out, [f"{what}: {left_out}"] if left_out else [])


_GROUPS = 3
"""Number of examples that are made of a pair."""


def _size(example: Example) -> int:
    return max(len(prompt) + len(response.tokens) for _, prompt, response in example.rows)


class _Maker:
    """Makes examples of a pair.

    Args:
        settings: Settings of the run.
        tokenizer: Tokenizer of the model.
        prefix: Token ids that stand before every prompt.
    """

    def __init__(self, settings: Settings, tokenizer: Any, prefix: Sequence[int]) -> None:
        self._count, self._template = settings.collectors.instructions, settings.collectors.instructions_template
        self._revise, self._prefix = RevisedPrompts(tokenizer, settings.chat), prefix

    def of_pair(self, pair: Example, draw: random.Random) -> list[Example]:
        """Return a pair of prompts for each response, and a group of four if the responses follow different ones."""
        best, worst = pair.responses
        known = instructions([best.text, worst.text])
        groups = []
        for response in (best, worst):
            followed, others = ([x for x in known if x.holds(response.text) is kept] for kept in (True, False))
            asked = draw.sample(followed, min(self._count, len(followed)))
            replaced = draw.randint(1, min(len(asked), len(others)))
            refused = [*draw.sample(others, replaced), *asked[replaced:]]
            draw.shuffle(refused)
            groups.append([self._under(pair, response, x) for x in (asked, refused)])
        if telling := [x for x in known if x.holds(best.text) and not x.holds(worst.text)]:
            asked = draw.sample(telling, min(self._count, len(telling)))
            groups.append([self._under(pair, best, asked), worst, best, self._under(pair, worst, asked)])
        return [pair._replace(responses=rows) for rows in groups]

    def _under(self, pair: Example, response: Response, asked: Sequence[Instruction]) -> Response:
        """Return a response under the prompt of its pair with instructions."""
        text = " ".join(x.text for x in asked)

        def revised(question: str) -> str:
            return filled(self._template, question=question, instructions=text)

        own = pair.revised(revised)
        prompt = [*self._prefix, *self._revise(own)]
        return response._replace(question=own.question, prompt=prompt, messages=own.messages)
