"""Rewards of tokens or turns: TRL's reward functions may return a list in place of the reward of a completion."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcredit.adapters.rows import Fields, host_rows


class TokenRewards:
    """A reward function that returns the sums of lists to TRL.

    Args:
        function: A reward function of TRL.

    Attributes:
        lists: For each completion of the last call, the list that the function returned, or None for a number.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__: str = getattr(function, "__name__", type(function).__name__)
        self.lists: list[list[float] | None] = []

    def __call__(self, **columns: Any) -> Any:
        """Return one number, or None, for each completion.

        Args:
            columns: As TRL passes them.

        Raises:
            ValueError: A list has an entry that is no finite number.
        """
        return self._summed(self.function(**columns))

    def _summed(self, rewards: Iterable[Any]) -> list[Any]:
        self.lists, sums = [], []
        for row, x in enumerate(rewards):
            if isinstance(x, Tensor | np.ndarray):
                x = x.tolist()
            values = list(x) if isinstance(x, Sequence) else None
            wrong = [v for v in values or [] if not isinstance(v, int | float) or not math.isfinite(v)]
            if wrong:
                raise ValueError(
                    f"{self.__name__}: expected finite numbers in the list of completion {row}, got {wrong[0]!r}"
                )
            self.lists.append(values)
            sums.append(x if values is None else sum(values))
        return sums


class AsyncTokenRewards(TokenRewards):
    """The same for an asynchronous function."""

    async def __call__(self, **columns: Any) -> Any:
        """Return one number, or None, for each completion.

        Args:
            columns: As TRL passes them.
        """
        return self._summed(await self.function(**columns))


def with_lists(function: Any) -> Any:
    """Return a reward function that may return lists; a reward model as it is.

    Args:
        function: A reward function or a reward model of TRL.
    """
    if isinstance(function, torch.nn.Module):
        return function
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    waits = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)
    return AsyncTokenRewards(function) if waits else TokenRewards(function)


def listed(functions: Sequence[Any], rows: int) -> Tensor:
    """Return which functions returned a list for which completion of their last call, bool ``(B, F)``.

    Args:
        functions: From :func:`with_lists`.
        rows: Number of completions B.
    """
    none = [None] * rows
    given = [function.lists if isinstance(function, TokenRewards) else none for function in functions]
    return torch.tensor([[x is not None for x in row] for row in given], dtype=torch.bool).reshape(-1, rows).T


def token_rewards(functions: Sequence[Any], weights: Tensor, real: Tensor, response_mask: Tensor) -> Tensor:
    """Return the weighted sum of the lists of all functions, at the tokens that they belong to.

    A list has one number per token of the completion, or one per turn: a maximal run of tokens that the policy chose,
    the last of which has the reward of the turn. A completion that is wholly masked has none.

    Args:
        functions: From :func:`with_lists`.
        weights: float ``[F]``.
        real: ``(B, C)``, nonzero on the tokens of the completions.
        response_mask: ``(B, C)``, nonzero where the policy chose the token.

    Returns:
        float32 ``(B, C)``, 0 where the policy did not choose the token.

    Raises:
        ValueError: A list has another length.
    """
    lengths, mask = real.sum(1).tolist(), response_mask.cpu().numpy() != 0
    dense = np.zeros(mask.shape)
    for function, weight in zip(functions, weights.tolist(), strict=True):
        for row, x in enumerate(function.lists if isinstance(function, TokenRewards) else ()):
            if x is None or not lengths[row]:
                continue
            last = np.flatnonzero(mask[row] & ~np.append(mask[row, 1:], False))
            places = range(lengths[row]) if len(x) == lengths[row] else last
            if len(x) != len(places):
                raise ValueError(
                    f"{function.__name__}: expected a number, or a list of one for each of the {lengths[row]} tokens "
                    f"or {len(last)} turns of completion {row}, got a list of {len(x)}"
                )
            dense[row, places] += weight * np.array(x)
    names = range(len(mask))
    rows = host_rows(names, names, dense, response_mask, "sum", Fields("completion", "completion", "rewards"))
    assert rows.token_rewards is not None
    return rows.token_rewards
