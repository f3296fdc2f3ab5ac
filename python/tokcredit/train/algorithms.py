"""Problems that a small model solves step by step, and their solutions: sums of digits and counts of a letter.

Each function draws a problem and returns its question, a response that solves it, and its answer. ``wrong`` says for
each step whether it is a mistake; the rest of the response is consistent with it. The steps are few and come again in
other problems, so what was learned from some problems holds for others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Solved(NamedTuple):
    """A problem with a response.

    Attributes:
        question: Text of the question.
        response: Steps, then the result after ``>``.
        answer: Right answer.
    """

    question: str
    response: str
    answer: str


Wrong = Callable[[], bool]
Draw = Callable[[random.Random, int, Wrong], Solved]


def never() -> bool:
    """Return that a step is no mistake."""
    return False


def sums(generator: random.Random, size: int, wrong: Wrong = never) -> Solved:
    """Return a sum of digits: ``7+5+8=`` with the partial sums ``7+5=12;12+8=20>20``.

    Args:
        generator: Source of randomness.
        size: Number of terms, at least 2.
        wrong: Whether a partial sum is random.
    """
    terms = [generator.randrange(1, 10) for _ in range(size)]
    total, steps = terms[0], []
    for term in terms[1:]:
        before, total = total, total + term
        if wrong():
            total = generator.randrange(9 * size)
        steps.append(f"{before}+{term}={total}")
    return Solved(f"{'+'.join(map(str, terms))}=", f"{';'.join(steps)}>{total}", str(sum(terms)))


def letters(generator: random.Random, size: int, wrong: Wrong = never) -> Solved:
    """Return letters of which one is counted: ``abba:b=`` with the counts so far ``a0b1b2a2>2``.

    Args:
        generator: Source of randomness.
        size: Number of letters.
        wrong: Whether a count is random.
    """
    text = "".join(generator.choices("abc", k=size))
    letter = generator.choice("abc")
    count, steps = 0, ""
    for x in text:
        count += x == letter
        if wrong():
            count = generator.randrange(10)
        steps += f"{x}{count}"
    return Solved(f"{text}:{letter}=", f"{steps}>{count}", str(text.count(letter)))


DRAWS: dict[str, Draw] = {"sums": sums, "letters": letters}
"""The functions by the name of their kind."""
SIZES = {"sums": 6, "letters": 8}
"""Usual size of a problem of each kind, which the warm-up texts have."""


@dataclass(frozen=True)
class Texts:
    """Warm-up texts of a kind of problem, for :func:`tokcredit.train.tiny.warm`.

    Args:
        kind: Name of the kind.
    """

    kind: str

    def __call__(self, generator: random.Random, noise: float) -> str:
        """Return a question and a response with mistakes.

        Args:
            generator: Source of randomness.
            noise: Probability of a mistake at a step.
        """
        solved = DRAWS[self.kind](generator, SIZES[self.kind], lambda: generator.random() < noise)
        return solved.question + solved.response
