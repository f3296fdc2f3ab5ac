"""Cumulative quantities along rollouts: sums, positions, discounted returns, generalized advantages.

All are one masked recurrence, ``state = decay * state + x``, walked forward or backward over the tokens that the
policy chose. Masked tokens are stepped over: they neither decay nor reset the state, and the result is 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.ops import Rows


def cumulative(x: Tensor, rows: Rows, carry: Tensor | None = None) -> Tensor:
    """Sums of each row up to and including each token.

    ``y[t] = carry[row] + sum(x[s] for s <= t)``. With log-ratios this is the log prefix ratio.

    Args:
        x: float ``[N]``.
        rows: the spans and the mask.
        carry: float ``[R]``, the sum before the row begins (for rows cut into shards), or None for 0.
    """
    return ops.scan(x, rows, carry=carry)[0]


def positions(rows: Rows, size: int) -> Tensor:
    """Position of each token among the unmasked tokens of its row, counted from 1; float32 ``[size]``.

    Counts are exact up to 2^24 tokens in a row.
    """
    ones = torch.ones(size, device=rows.begin.device)
    return ops.scan(ones, rows)[0]


def returns(rewards: Tensor, rows: Rows, discount: float = 1.0) -> Tensor:
    """Discounted sums of what follows: ``y[t] = rewards[t] + discount * y[next unmasked token]``; ``[N]``."""
    return ops.scan(rewards, rows, decay=discount, reverse=True)[0]


def following(x: Tensor, rows: Rows, last: Tensor | None = None) -> Tensor:
    """Value of x at the next unmasked token of the row, and ``last[row]`` (or 0) at the final one; ``[N]``."""
    return ops.scan(x, rows, decay=0.0, carry=last, reverse=True, exclusive=True)[0]


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    rows: Rows,
    discount: float = 1.0,
    trace: float = 1.0,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Generalized advantage estimates of each token.

    ``delta[t] = rewards[t] + discount * values[next] - values[t]`` and
    ``y[t] = delta[t] + discount * trace * y[next]``, where next is the next unmasked token.

    Args:
        rewards: float ``[N]``, per token, or 0-d, of every token.
        values: float ``[N]``, the critic before each token.
        rows: the spans and the mask.
        discount: gamma.
        trace: lambda; 1 gives returns minus values, 0 the one-step difference.
        bootstrap: float ``[R]``, the value after the last token, or None for 0 (the row ended).

    References:
        Schulman et al., arXiv 1506.02438.
    """
    values = values.to(torch.promote_types(rewards.dtype, values.dtype))
    delta = following(values, rows, bootstrap).mul_(discount).add_(rewards).sub_(values)
    return ops.scan(delta, rows, decay=discount * trace, reverse=True)[0]
