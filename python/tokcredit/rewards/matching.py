"""Rewards from a comparison with what was expected: tool calls, answers, options of a multiple-choice question."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range

Similarities = NDArray[np.float64]


class Call(NamedTuple):
    """A tool call.

    Attributes:
        name: Name of the tool.
        arguments: Arguments by name, or None if they could not be parsed; such a call matches nothing.
    """

    name: str
    arguments: Mapping[str, Any] | None


def similarity(call: Call, reference: Call, ignore_case: bool = False) -> float:
    """Return how similar a call is to a reference call, from 0 to 1; 0 if it calls another tool.

    With ``N`` and ``M`` the sets of argument names of the call and of the reference, and ``k`` the number of arguments
    of the reference to which the call gives the same value::

        (1 + |N & M| / |N | M| + k) / (2 + |M|)

    The fraction is 1 for two calls without arguments.

    Args:
        call: The call.
        reference: The call that was expected.
        ignore_case: Whether names of tools are compared without case.

    References:
        arXiv 2601.10712.
    """
    names = (call.name.lower(), reference.name.lower()) if ignore_case else (call.name, reference.name)
    if names[0] != names[1] or call.arguments is None or reference.arguments is None:
        return 0.0
    own, expected = set(call.arguments), set(reference.arguments)
    shared = len(own & expected) / len(own | expected) if own | expected else 1.0
    equal = sum(name in own and call.arguments[name] == value for name, value in reference.arguments.items())
    return (1 + shared + equal) / (2 + len(expected))


def similarities(calls: Sequence[Call], references: Sequence[Call], ignore_case: bool = False) -> Similarities:
    """Return the :func:`similarity` of every pair, float64 ``[calls, references]``.

    Args:
        calls: The calls.
        references: The calls that were expected.
        ignore_case: Whether names of tools are compared without case.
    """
    pairs = [[similarity(call, reference, ignore_case) for reference in references] for call in calls]
    return np.array(pairs, dtype=np.float64).reshape(len(calls), len(references))


def _matched(s: Similarities, pairs: Sequence[tuple[int, int]], penalty: float) -> Similarities:
    rewards = np.full(s.shape[0], -penalty)
    for i, j in pairs:
        if s[i, j] > 0:
            rewards[i] = s[i, j]
    return rewards


_Penalty = Annotated[float, Range("number", at_least=0)]


def optimal(s: Similarities, penalty: _Penalty = 0.0) -> Similarities:
    """Return the reward of each call under the one-to-one matching of largest total similarity, float64 ``[calls]``.

    The reward of a matched call is its similarity. A pair of similarity 0 does not count as a match. Needs scipy.

    Args:
        s: float64 ``[calls, references]``, similarities.
        penalty: A call without a match has the reward ``-penalty``.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("matching.optimal needs scipy: pip install tokcredit[matching]") from error
    calls, references = linear_sum_assignment(s, maximize=True)
    return _matched(s, list(zip(calls.tolist(), references.tolist(), strict=True)), penalty)


def greedy(s: Similarities, penalty: _Penalty = 0.0) -> Similarities:
    """Return the reward of each call under a greedy one-to-one matching, float64 ``[calls]``.

    Pairs are taken in descending order of similarity, equal ones in their order. The total is not always the largest.

    Args:
        s: float64 ``[calls, references]``, similarities.
        penalty: A call without a match has the reward ``-penalty``.
    """
    pairs: list[tuple[int, int]] = []
    order = np.argsort(-s, axis=None, kind="stable")
    free = (np.ones(s.shape[0], dtype=bool), np.ones(s.shape[1], dtype=bool))
    for i, j in zip(*np.unravel_index(order, s.shape), strict=True):
        if free[0][i] and free[1][j]:
            free[0][i] = free[1][j] = False
            pairs.append((int(i), int(j)))
    return _matched(s, pairs, penalty)


def sinkhorn(
    s: Similarities,
    regularization: Annotated[float, Range("number", above=0)] = 0.1,
    iterations: Annotated[int, Range("whole number", at_least=1)] = 1000,
) -> Similarities:
    """Return the reward of each call i under a soft matching, ``sum over j of plan[i, j] * s[i, j]``.

    The plan maximizes the total similarity plus ``regularization`` times its entropy, with row sums ``1 / calls`` and
    column sums ``1 / references``. Rewards are therefore about ``calls`` times smaller than those of :func:`optimal`.
    Without references they are 0.

    Args:
        s: float64 ``[calls, references]``, similarities.
        regularization: Weight of the entropy, above 0.
        iterations: Largest number of iterations.

    Returns:
        float64 ``[calls]``.
    """
    m, n = s.shape
    if m == 0 or n == 0:
        return np.zeros(m)
    scores, u, v = s / regularization, np.zeros(m), np.zeros(n)
    for _ in range(iterations):
        before = u
        u = -np.log(m) - np.logaddexp.reduce(scores + v, axis=1)
        v = -np.log(n) - np.logaddexp.reduce(scores + u[:, None], axis=0)
        if np.abs(u - before).max() < 1e-12:
            break
    return (np.exp(scores + u[:, None] + v) * s).sum(1)


def rewards(
    turns: Sequence[Sequence[Call] | float],
    references: Sequence[Call],
    rule: Callable[[Similarities], Similarities] = optimal,
    ignore_case: bool = False,
) -> list[float]:
    """Return the reward of each turn of a row: the mean over its calls, and 0 for a turn without calls.

    Args:
        turns: The calls of each turn, or the reward of a turn that makes none, for example :func:`f1` of its answer.
        references: The calls that were expected from the whole row.
        rule: :func:`optimal`, :func:`greedy`, :func:`sinkhorn`, or a ``functools.partial`` of one.
        ignore_case: Whether names of tools are compared without case.
    """
    calls = [call for turn in turns if not isinstance(turn, float | int) for call in turn]
    each = iter(rule(similarities(calls, references, ignore_case)).tolist())
    out = []
    for turn in turns:
        if isinstance(turn, float | int):
            out.append(float(turn))
        else:
            own = [next(each) for _ in turn]
            out.append(sum(own) / len(own) if own else 0.0)
    return out


def turn_rewards(batch: Rollouts, rewards: Sequence[Sequence[float]]) -> Tensor:
    """Return the reward of each turn at its last token, and 0 at other tokens, float32 ``[N]``.

    A turn is a maximal run of tokens that the policy chose. The result is the input ``turn_rewards``.

    Args:
        batch: The rollouts.
        rewards: For each row one number per turn.

    Raises:
        ValueError: A row has another number of turns.
    """
    mask = batch.response_mask.cpu()
    out = torch.zeros(batch.num_tokens)
    spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
    if len(rewards) != len(spans):
        raise ValueError(f"rewards: expected one list for each of {len(spans)} rows, got {len(rewards)}")
    for row, ((begin, end), own) in enumerate(zip(spans, rewards, strict=True)):
        inside = torch.cat([mask[begin:end], torch.zeros(1, dtype=torch.bool)])
        ends = (inside[:-1] & ~inside[1:]).nonzero()[:, 0]
        if len(ends) != len(own):
            raise ValueError(f"rewards: expected {len(ends)} numbers for the turns of row {row}, got {len(own)}")
        out[begin + ends] = torch.tensor(own, dtype=torch.float32)
    return out.to(batch.tokens.device)


def f1(answer: str, reference: str) -> float:
    """Return the F1 score of the sets of words of two texts, from 0 to 1; 0 if one has no words.

    Words are compared in lower case and without punctuation.

    Args:
        answer: First text.
        reference: Second text.
    """
    own, expected = (set(re.sub(r"[^\w\s]|_", " ", text.lower()).split()) for text in (answer, reference))
    shared = len(own & expected)
    return 2 * shared / (len(own) + len(expected)) if shared else 0.0


def options(chosen: Set[str], true: Set[str]) -> float:
    """Return the reward of a multiple-choice answer: the share of true options that it has, 0 with any wrong option.

    Args:
        chosen: Options that were chosen.
        true: Options that are right.

    References:
        arXiv 2505.24718.
    """
    return len(chosen) / len(true) if chosen and chosen <= true else 0.0
