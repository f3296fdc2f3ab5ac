"""Which two responses of a group become a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

Sequences = Sequence[Sequence[Any]]


def choose(
    how: str, rewards: Sequence[float], responses: Sequences, gap: float, most: int
) -> Iterator[tuple[int, int]]:
    """Yield the numbers of a chosen and a rejected response, the best pair first. No response is in two pairs.

    Args:
        how: Name of a rule; see :class:`~tokcredit.pairs.settings.PairsSettings`.
        rewards: Reward of each response.
        responses: Tokens, or characters, of each response.
        gap: Rewards of a pair differ by more than this.
        most: Largest number of pairs.
    """
    numbers = range(len(rewards))
    pairs = [(i, j) for i in numbers for j in numbers if rewards[i] - rewards[j] > gap and responses[i] != responses[j]]
    rule = _RULES[how]
    taken: set[int] = set()
    for pair in sorted(pairs, key=lambda p: rule(rewards[p[0]], rewards[p[1]], responses[p[0]], responses[p[1]])):
        if taken.isdisjoint(pair):
            taken |= set(pair)
            most -= 1
            yield pair
            if not most:
                return


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _best_worst(better: float, worse: float, a: Sequence[Any], b: Sequence[Any]) -> float:
    return worse - better


def _closest(better: float, worse: float, a: Sequence[Any], b: Sequence[Any]) -> float:
    begin = _common(a, b)
    return len(a) + len(b) - 2 * (begin + _common(a[begin:][::-1], b[begin:][::-1]))


def _latest(better: float, worse: float, a: Sequence[Any], b: Sequence[Any]) -> float:
    return -_common(a, b)


_RULES: dict[str, Callable[[float, float, Sequence[Any], Sequence[Any]], float]] = {
    "best_worst": _best_worst,
    "closest": _closest,
    "latest": _latest,
}
"""For each rule a number that is smallest for the best pair; the first of equal ones is taken."""
