"""Cumulative quantities along rows: sums, positions, discounted returns, generalized advantages.

All of them are one masked recurrence, ``state = decay * state + x``, forward or backward over the tokens that the mask
keeps. Masked tokens are skipped: they neither decay nor reset the state, and the result is 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, constant, instance, per_token, tensor
from tokcredit.spans import Spans, require_spans


def _rowwise(name: str, x: Tensor | None, spans: Spans) -> Tensor | None:
    return None if x is None else tensor(name, x, FLOATS, (spans.num_rows,), spans.device)


def cumulative(x: Tensor, spans: Spans, carry: Tensor | None = None) -> Tensor:
    """Return the sum of each row up to and including each token.

    ``y[t] = carry[row] + sum(x[s] for s <= t)``. With ``x`` the log-ratios this is the log-ratio of the prefix.

    Args:
        x: float ``[N]``.
        spans: The rows.
        carry: float ``[R]``, the sum before each row begins, or None for 0.

    Returns:
        float32, or float64 when ``x`` is, ``[N]``. It has gradients to ``x`` and ``carry``.
    """
    require_spans("spans", spans)
    per_token("x", x, spans.size, spans.device)
    return ops.scan(x, spans, carry=_rowwise("carry", carry, spans))[0]


def positions(spans: Spans, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the position of each token among the unmasked tokens of its row, counted from 1.

    Args:
        spans: The rows.
        dtype: float32, exact up to 2^24 tokens in a row, or float64.

    Returns:
        ``[N]`` of this dtype; 0 at masked tokens and padding.
    """
    require_spans("spans", spans)
    ones = torch.ones(spans.size, dtype=dtype, device=spans.device)
    return ops.scan(ones, spans)[0]


def returns(rewards: Tensor, spans: Spans, discount: float = 1.0) -> Tensor:
    """Return the discounted sum of rewards from each token on.

    ``y[t] = rewards[t] + discount * y[next unmasked token]``.

    Args:
        rewards: float ``[N]``.
        spans: The rows.
        discount: gamma.

    Returns:
        float ``[N]``.
    """
    require_spans("spans", spans)
    per_token("rewards", rewards, spans.size, spans.device)
    return ops.scan(rewards, spans, decay=discount, reverse=True)[0]


def following(x: Tensor, spans: Spans, last: Tensor | None = None) -> Tensor:
    """Return the value of ``x`` at the next unmasked token of the row.

    Args:
        x: float ``[N]``.
        spans: The rows.
        last: float ``[R]``, the result at the last unmasked token of each row, or None for 0.

    Returns:
        float ``[N]``.
    """
    require_spans("spans", spans)
    per_token("x", x, spans.size, spans.device)
    return ops.scan(x, spans, decay=0.0, carry=_rowwise("last", last, spans), reverse=True, exclusive=True)[0]


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    spans: Spans,
    discount: float = 1.0,
    trace: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Return generalized advantage estimates (GAE).

    With ``next`` the next unmasked token of the row::

        delta[t] = rewards[t] + discount * values[next] - values[t]
        y[t] = delta[t] + discount * trace * y[next]

    Args:
        rewards: float ``[N]``, or 0-d for the same reward at every token.
        values: float ``[N]``, the critic's value before each token.
        spans: The rows.
        discount: gamma.
        trace: lambda. 1 gives returns minus values, 0 the one-step difference. A float ``[R]`` without gradient has one
            for each row.
        bootstrap: float ``[R]``, the value after the last token of each row, or None for 0 (the row ended).

    Returns:
        float ``[N]``. It has gradients to ``rewards``, ``values`` and ``bootstrap``.

    Raises:
        ValueError: A shape is wrong, or ``trace`` requires gradient.

    References:
        Schulman et al., arXiv 1506.02438.
    """
    require_spans("spans", spans)
    per_token("values", values, spans.size, spans.device)
    instance("rewards", rewards, Tensor)
    tensor("rewards", rewards, FLOATS, () if rewards.dim() == 0 else (spans.size,), spans.device)
    values = values.to(torch.promote_types(rewards.dtype, values.dtype))
    delta = following(values, spans, bootstrap).mul_(discount).add_(rewards).sub_(values)
    if isinstance(trace, Tensor):
        trace = constant("trace", tensor("trace", trace, FLOATS, (spans.num_rows,), spans.device)).double()
    return ops.scan(delta, spans, decay=discount * trace, reverse=True)[0]
