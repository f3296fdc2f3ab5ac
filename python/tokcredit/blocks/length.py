"""Values of the number of remaining tokens: a bounded value, its targets and losses, and the way back to tokens.

With l remaining tokens the value is ``V = -(1 - gamma^l)`` in ``(-1, 0]``: the discounted return of a reward of
``-(1 - gamma)`` per token. A head predicts ``z`` with ``V = -sigmoid(z)``.

References:
    arXiv 2604.27039.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops
from tokcredit.arguments import float_tensor, per_token, tensor
from tokcredit.blocks import scan, segment
from tokcredit.spans import Spans, require_spans


def check_gamma(gamma: float) -> None:
    """Check that gamma is between 0 and 1.

    Args:
        gamma: The discount per token.

    Raises:
        ValueError: It is not.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma: expected a number between 0 and 1, got {gamma}")


def gamma_for(length: float, resolved: float = 0.99) -> float:
    """Return the gamma whose value at ``length`` tokens is ``-resolved``.

    Args:
        length: Tokens, above 0; the 99th percentile of lengths is a good choice.
        resolved: Between 0 and 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if not (length > 0 and 0 < resolved < 1):
        raise ValueError(f"length, resolved: expected more than 0, and between 0 and 1, got {length}, {resolved}")
    return float((1 - resolved) ** (1 / length))


def remaining(spans: Spans) -> Tensor:
    """Return the number of unmasked tokens from each token to the end of its row, itself included.

    Args:
        spans: The rows.

    Returns:
        float64 ``[N]``, 0 where masked.
    """
    require_spans("spans", spans)
    return ops.scan(torch.ones(spans.size, dtype=torch.float64, device=spans.device), spans, reverse=True)[0]


def targets(spans: Spans, gamma: float, values: Tensor | None = None, trace: float = 1.0) -> Tensor:
    """Return the value of the state before each token, ``gamma^l - 1`` with l the remaining tokens.

    Args:
        spans: The rows, each of which must have ended by itself.
        gamma: Between 0 and 1.
        values: float ``[N]``, earlier predictions, needed for ``trace < 1``: the target is then a mixture of n-step
            returns, ``V + sum (gamma trace)^k delta``.
        trace: lambda; 1 gives the exact value.

    Returns:
        float32, or float64 when ``values`` is, ``[N]``; 0 where masked.

    Raises:
        TypeError: ``values`` is not a float tensor.
        ValueError: gamma is out of range, values are missing, or their shape is wrong.
    """
    check_gamma(gamma)
    require_spans("spans", spans)
    if values is not None:
        per_token("values", values, spans.size, spans.device)
    if trace == 1:
        exact = torch.expm1(remaining(spans) * math.log(gamma))
        return exact.to(torch.float32 if values is None or values.dtype != torch.float64 else torch.float64)
    if values is None:
        raise ValueError(f"values: expected float [{spans.size}] because trace is {trace}, got None")
    return torch.where(_inside(spans), values, 0) + advantages(values, spans, gamma, trace)


def advantages(
    values: Tensor, spans: Spans, gamma: float, trace: float = 1.0, truncated: Tensor | None = None
) -> Tensor:
    """Return by how much each token made its row shorter than predicted.

    These are the generalized advantages of a reward of ``-(1 - gamma)`` per token. With ``trace=0`` they are the
    surprise of each token: more than 0.01 in size marks a token that changes the expected length.

    Args:
        values: float ``[N]``, predictions before each token.
        spans: The rows.
        gamma: Between 0 and 1.
        trace: lambda.
        truncated: bool ``[R]``, rows that were cut. They are taken to continue as predicted before their last token,
            which is then no surprise. None means that every row ended.

    Returns:
        float ``[N]``.

    Raises:
        ValueError: gamma is out of range.
    """
    check_gamma(gamma)
    require_spans("spans", spans)
    per_token("values", values, spans.size, spans.device)
    if truncated is not None:
        tensor("truncated", truncated, (torch.bool,), (spans.num_rows,), spans.device)
    cost, after = torch.full((), gamma - 1, dtype=values.dtype, device=values.device), None
    if truncated is not None:
        last = ops.scan(values, spans, decay=0.0)[1]
        after = torch.where(truncated, (1 + last) / gamma - 1, 0).clamp(max=0)
    return scan.generalized_advantages(cost, values, spans, gamma, trace, after)


def squared(z: Tensor, target: Tensor, spans: Spans, floor: float | None = None) -> Tensor:
    """Return the mean over tokens of ``(V - target)^2``, with its gradient to ``z``.

    Args:
        z: float ``[N]``, outputs of the head.
        target: float ``[N]``.
        spans: The rows.
        floor: The error is divided by ``max(|target|, floor)``, or None for no division. ``1 - gamma`` is the value of
            one token.

    Returns:
        0-d.
    """
    inside = _regression(z, target, spans)
    error = -torch.where(inside, z, 0).sigmoid() - torch.where(inside, target, 0)
    if floor is not None:
        error = error / target.abs().clamp(min=floor)
    return _token_mean(error**2, spans)


def cross_entropy(z: Tensor, target: Tensor, spans: Spans) -> Tensor:
    """Return the mean over tokens of the binary cross-entropy between ``sigmoid(z)`` and ``-target``.

    Args:
        z: float ``[N]``, outputs of the head.
        target: float ``[N]``.
        spans: The rows.

    Returns:
        0-d, with its gradient to ``z``.
    """
    z, share = torch.where(_regression(z, target, spans), z, 0), -target.to(z.dtype)
    return _token_mean(functional.binary_cross_entropy_with_logits(z, share, reduction="none"), spans)


def _regression(z: Tensor, target: Tensor, spans: Spans) -> Tensor:
    """Check the arguments of a loss and return the mask of the tokens inside rows."""
    require_spans("spans", spans)
    per_token("z", z, spans.size, spans.device)
    per_token("target", target, spans.size, spans.device)
    return _inside(spans)


def _inside(spans: Spans) -> Tensor:
    return ops.spread(torch.ones_like(spans.begin, dtype=torch.bool), spans)


def _token_mean(x: Tensor, spans: Spans) -> Tensor:
    return segment.sum(x, spans).sum() / segment.count(spans).sum().clamp(min=1)


def tokens(z: Tensor, gamma: float) -> Tensor:
    """Return the remaining tokens that a prediction means, ``-softplus(z) / log(gamma)``.

    Args:
        z: Outputs of the head, any shape.
        gamma: That of the head.
    """
    check_gamma(gamma)
    float_tensor("z", z)
    return functional.softplus(z) / -math.log(gamma)


def tokens_of_value(value: Tensor, gamma: float) -> Tensor:
    """Return the remaining tokens at a value in ``(-1, 0]``, ``log(1 + V) / log(gamma)``.

    It is ill-conditioned near -1; :func:`tokens` is not. Values are clamped to ``[-1 + 1e-12, 0]``, 1e-6 in float32.

    Args:
        value: Any shape.
        gamma: That of the head.
    """
    check_gamma(gamma)
    float_tensor("value", value)
    edge = 1e-12 if value.dtype == torch.float64 else 1e-6
    value = value if value.dtype == torch.float64 else value.float()
    return value.clamp(-1 + edge, 0).log1p() / math.log(gamma)
